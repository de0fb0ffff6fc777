"""systemd's native protocol, and a journald that does not read: a socket of our own stands for it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct

import pytest
from gpujobd import journald
from gpujobd.journald import Journald


class Receiver:
    """What journald does with its socket."""

    def __init__(self, path):
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setblocking(False)

    def close(self):
        self.socket.close()
        os.unlink(self.path)

    def entries(self):
        """Everything that is there, parsed."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, ancillary, _, _ = self.socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
                for _, _, raw in ancillary:
                    (fd,) = struct.unpack("i", raw)
                    with open(fd, "rb") as file:
                        os.lseek(fd, 0, os.SEEK_SET)
                        data = file.read()
                        with pytest.raises(OSError, match="not permitted"):  # sealed
                            os.ftruncate(fd, 0)
                found.append(parse(data))
        return found


def parse(data):
    """The fields of an entry, as journald reads them."""
    fields = []
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + length], rest[8 + length + 1 :]
        fields.append((name.decode(), value.decode()))
        data = rest
    return fields


@pytest.fixture
def receiver(tmp_path):
    found = Receiver(tmp_path / "socket")
    yield found
    with contextlib.suppress(OSError):
        found.close()


@pytest.fixture
def sender(receiver):
    found = Journald(lambda count: journald.entry([("MISSED", count)]), receiver.path)
    yield found
    found._waiting.clear()
    found.dropped = 0
    found.close()


def numbered(number, size=0):
    return journald.entry([("NUMBER", number), ("FILL", "x" * size)])


def numbers(entries):
    return [value if name == "NUMBER" else f"{name} {value}" for (name, value), *_ in entries]


@pytest.mark.parametrize(
    "value", ["", "plain", "a=b", "two\nlines", "\n", "\nFORGED=1\n", "x\nUSER\n\0\0", "\udcff", "ö"]
)
def test_any_value_comes_back_whole_and_begins_no_field_of_its_own(value):
    framed = journald.entry([("FIRST", value), ("SECOND", 2)])
    expected = value.encode("utf-8", "backslashreplace").decode()
    assert sorted(parse(framed)) == [("FIRST", expected), ("SECOND", "2")]


def test_an_entry_is_one_datagram(sender, receiver):
    sender.send(numbered(1))
    sender.send(numbered(2))
    assert numbers(receiver.entries()) == ["1", "2"]


def test_an_entry_too_large_for_a_datagram_comes_as_a_sealed_file(sender, receiver):
    sender.send(numbered(1, 2_000_000))
    sender.send(numbered(2))
    large, small = receiver.entries()
    assert dict(large)["FILL"] == "x" * 2_000_000
    assert numbers([small]) == ["2"]
    assert sender.dropped == 0


def test_a_journald_that_does_not_read_gets_all_in_order_when_it_reads_again(sender, receiver):
    for number in range(2000):
        sender.send(numbered(number, 1000))
    found = []
    while not sender.flush():
        found += receiver.entries()
    found += receiver.entries()
    assert numbers(found) == [str(number) for number in range(2000)]
    assert sender.dropped == 0


def test_what_is_beyond_the_bound_is_counted_where_it_is_missing(sender, receiver, monkeypatch):
    monkeypatch.setattr(journald, "WAITING_BYTES_MAX", 20_000)
    count = 3000
    for number in range(count):
        sender.send(numbered(number, 1000))
    lost = sender.dropped
    assert 0 < lost < count
    found = []
    while not sender.flush():
        found += receiver.entries()
    sender.send(numbered("after"))
    found += receiver.entries()
    kept = [str(number) for number in range(count - lost)]
    assert numbers(found) == [*kept, f"MISSED {lost}", "after"]
    assert sender.dropped == 0


def test_a_new_socket_at_the_path_is_found(sender, receiver):
    sender.send(numbered(1))
    assert numbers(receiver.entries()) == ["1"]
    receiver.close()
    sender.send(numbered(2))  # there is none
    assert not sender.flush()
    again = Receiver(receiver.path)
    sender.send(numbered(3))
    assert numbers(again.entries()) == ["2", "3"]
    again.socket.close()  # dead, and its name still there
    sender.send(numbered(4))
    os.unlink(again.path)
    last = Receiver(again.path)
    assert sender.flush()
    assert numbers(last.entries()) == ["4"]
    last.close()


def test_an_entry_that_can_never_be_sent_is_counted_and_holds_up_nothing(sender, receiver, monkeypatch):
    def refused(_):
        raise OSError(errno.EPERM, "not permitted")

    monkeypatch.setattr(sender, "_send_sealed", refused)
    sender.send(numbered(1, 2_000_000))
    sender.send(numbered(2))
    assert numbers(receiver.entries()) == ["MISSED 1", "2"]


def test_at_the_end_what_waits_gets_a_moment_and_no_more(receiver, monkeypatch):
    monkeypatch.setattr(journald, "CLOSE_S", 0.05)
    ending = Journald(lambda count: journald.entry([("MISSED", count)]), receiver.path)
    for number in range(2000):
        ending.send(numbered(number, 1000))
    ending.close()
    assert len(receiver.entries()) < 2000


def test_stderr_is_the_journal_only_where_its_device_and_inode_say_so(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        about = os.fstat(file.fileno())
        there = {"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino}"}
        assert journald.is_stderr(there, file.fileno())
        assert not journald.is_stderr({}, file.fileno())
        assert not journald.is_stderr({"JOURNAL_STREAM": f"{about.st_dev}:{about.st_ino + 1}"}, file.fileno())
        assert not journald.is_stderr({"JOURNAL_STREAM": "nonsense"}, file.fileno())
    assert not journald.is_stderr(there, 9999)  # no such descriptor
