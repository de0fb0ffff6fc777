"""The worker process: hello, load, one lease after the other, exit.

    main thread       load, then the handler's calls
    pipe              messages of the daemon; its end of file is the end of this process
    heartbeat         every heartbeat_s, whatever the main thread does
    reader, writer    of a lease, see job.py

Rule 1: SIGUSR2 and the message "dump" write the stacks of all threads to stderr, the signal even when no thread gets
to run Python code. SIGTERM ends the process as the system does it. SIGINT is the daemon's affair, not ours.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import platform
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any

from gpujobd_worker import __version__
from gpujobd_worker.call import Desk, Pulse, log
from gpujobd_worker.job import Lease
from gpujobd_worker.loader import Loaded, LoadError, load
from gpujobd_worker.pipe import Message, Pipe, leave, start_thread

EXIT_LOAD_FAILED = 1


class Process:
    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._pulse = Pulse()
        self._stop = threading.Event()  # of the latest lease
        self._stop_attempt = 0
        self._heartbeat_s = 1.0

    def run(self) -> None:
        start_thread("pipe", lambda: self._pipe.receive(self._deliver))
        self._pipe.send("hello", pid=os.getpid(), python=platform.python_version(), worker=__version__)
        message = self._inbox.get()
        if message["type"] != "load":
            raise ValueError(f"expected load, got {message['type']}")
        self._heartbeat_s = message.get("heartbeat_s", 1.0)
        start_thread("heartbeat", self._beat)
        loaded = self._load(message)
        self._serve(Desk(loaded.handler, loaded.gauge, self._pulse), message.get("checkpoint_s", 1.0))
        self._exit(loaded.handler)

    def _deliver(self, message: Message) -> None:
        """In the pipe's thread."""
        kind = message["type"]
        if kind == "dump":
            faulthandler.dump_traceback(all_threads=True)
        elif kind == "yield":
            if message["attempt"] == self._stop_attempt:  # else it is about a lease that is over
                self._stop.set()
        else:
            if kind == "lease":
                self._stop_attempt, self._stop = message["attempt"], threading.Event()
                message["stop"] = self._stop
            self._inbox.put(message)

    def _beat(self) -> None:
        pulse = self._pulse
        while True:
            self._pipe.send(
                "heartbeat",
                attempt=pulse.attempt,
                line=pulse.line,
                batch=pulse.batch,
                progress=pulse.progress,
            )
            time.sleep(self._heartbeat_s)

    def _load(self, message: Message) -> Loaded:
        try:
            loaded = load(
                entry=message["entry"],
                path=message.get("path", []),
                device_name=message["device"],
                params=message.get("params", {}),
                threads=message.get("threads", 0),
            )
        except LoadError as error:
            log(error.trace or error.error)
            self._pipe.last_words(
                EXIT_LOAD_FAILED,
                "load_failed",
                error=error.error,
                trace=error.trace,
                out_of_memory=error.out_of_memory,
            )
        gauge = loaded.gauge
        self._pipe.send(
            "loaded",
            load_s=loaded.load_s,
            vram_bytes=gauge.peak_bytes(),
            device_bytes=gauge.total_bytes(),
            hardware=gauge.hardware(),
            uuid=gauge.uuid(),
        )
        return loaded

    def _serve(self, desk: Desk, checkpoint_s: float) -> None:
        while (message := self._inbox.get())["type"] != "exit":
            if message["type"] != "lease":
                raise ValueError(f"expected lease or exit, got {message['type']}")
            Lease(message, desk, self._pipe, checkpoint_s, message["stop"]).run()

    @staticmethod
    def _exit(handler: Any) -> None:
        close = getattr(handler, "close", None)
        if callable(close):
            try:
                close()
            except BaseException as error:  # noqa: BLE001 - the handler's code, and the end of it
                log(f"close(): {error!r}")
        leave(0)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="gpujobd-worker", description="Started by gpujobd, not by people.")
    parser.add_argument("--fd", type=int, required=True, help="inherited end of the message pipe")
    end = socket.socket(fileno=parser.parse_args(arguments).fd)
    end.set_inheritable(False)  # children of a handler must not hold the pipe open
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    Process(Pipe(end)).run()
