"""Reading: lines, numbers, items."""

from __future__ import annotations

import errno
import json
import os
import tempfile

import pytest
from gpujobd_worker import files, lines
from gpujobd_worker.failures import Failure
from gpujobd_worker.files import LeaseLost
from gpujobd_worker.lines import LINE_BYTES_MAX, TooLong, chunks, cut_lines, parse
from hypothesis import given
from hypothesis import strategies as st


def opened(content: bytes) -> int:
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    os.write(fd, content)
    return fd


def expected_lines(content: bytes) -> list[bytes]:
    found = content.split(b"\n")
    return found[:-1] if found[-1] == b"" else found


@given(st.lists(st.binary(max_size=12), max_size=30), st.integers(1, 9), st.booleans())
def test_lines_are_what_stands_between_newlines_whatever_the_block_size(parts, block, ended):
    content = b"\n".join(parts) + (b"\n" if ended else b"")
    fd = opened(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "READ_BYTES", block)
        found = [line for some in cut_lines(fd) for line in some]
    os.close(fd)
    assert found == expected_lines(content)


@given(st.integers(1, 40), st.data())
def test_chunks_give_exactly_the_lines_asked_for(count, data):
    after = data.draw(st.integers(0, count))
    last = data.draw(st.integers(after, count))
    fd = opened(b"".join(b"%d\n" % number for number in range(1, count + 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "READ_BYTES", data.draw(st.integers(1, 50)))
        patch.setattr(lines, "CHUNK_LINES_MAX", data.draw(st.integers(1, 10)))
        found = [
            (first + index, int(text))
            for first, some in chunks(fd, after, last)
            for index, text in enumerate(some)
        ]
    os.close(fd)
    assert found == [(number, number) for number in range(after + 1, last + 1)]


def test_input_that_ends_early_says_how_early():
    fd = opened(b"1\n2\n")
    with pytest.raises(LeaseLost, match="2 lines instead of 3"):
        list(chunks(fd, 0, 3))
    os.close(fd)


@pytest.mark.parametrize("extra", [0, 1])
def test_long_lines_are_not_kept_in_memory(extra):
    fd = opened(b"a\n" + b"x" * (LINE_BYTES_MAX + extra) + b"\nb")
    found = [line for some in cut_lines(fd) for line in some]
    os.close(fd)
    assert [len(line) for line in found] == [1, 0 if extra else LINE_BYTES_MAX, 1]
    assert isinstance(found[1], TooLong) == bool(extra)


def naively(text: bytes) -> object:
    """The item, or None where the line holds none."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        item = json.loads(text.decode(), parse_constant=refuse)
    except ValueError:
        return None
    return item if isinstance(item, dict) else None


pieces = st.sampled_from(
    [b"{", b"}", b'"a"', b":", b",", b"[", b"]", b"1", b"NaN", b" ", b"\r", b"\t", b"\xff", b"\\u0041"]
)
jsonish = st.lists(pieces, max_size=8).map(b"".join)
objects = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=3).map(
    lambda item: json.dumps(item).encode()
)


@given(st.lists(jsonish | objects, max_size=20))
def test_parsing_many_lines_is_parsing_each(texts):
    found = [None if isinstance(item, Failure) else item for item in parse(texts)]
    assert found == [naively(text) for text in texts]


@pytest.mark.parametrize(
    ("number", "cause"), [(errno.ENOENT, "input_lost"), (errno.EIO, "died"), (errno.EMFILE, "died")]
)
def test_an_input_that_the_disk_refuses_is_not_lost(monkeypatch, number, cause):
    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LeaseLost) as lost:
        files.open_to_read("input.jsonl")
    assert lost.value.cause == cause
    if number != errno.ENOENT:  # a job that is no retry has none
        with pytest.raises(LeaseLost) as lost:
            lines.read_numbers(0, 1)
        assert lost.value.cause == cause
