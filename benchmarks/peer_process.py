"""A peer as `peers.py` sees it: a process that is started, asked under a time limit, and stopped.

Between two answers the process rests (SIGSTOP): an engine whose threads wait in a loop for work
takes nothing from the one that is measured.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("peer.py")


class PeerError(Exception):
    """A peer died or took too long; its process is gone."""


class Peer:
    """One engine; `start` it before it is asked."""

    def __init__(self, engine: str, python: str, arguments: list[str], threads: int) -> None:
        self._command = [python, str(PROGRAM), engine, "--threads", str(threads), *arguments]
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Path(os.devnull)
        self.facts: dict[str, Any] = {}

    def start(self, log: Path, limit_s: float) -> float:
        """Seconds from the process's start to its first token; what it says goes to `log`."""
        self._log = log
        paths = [str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self._threads),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),  # for our own engine
        }
        started = time.monotonic()
        with log.open("wb") as complaints:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints,
                env=environment, start_new_session=True,
            )  # fmt: skip
        self.facts = self._read(limit_s)["facts"]
        elapsed_s = time.monotonic() - started
        self._signal(signal.SIGSTOP)
        return elapsed_s

    @property
    def is_running(self) -> bool:
        """Whether it can be asked."""
        return self._process is not None

    def ask(self, request: Mapping[str, int], limit_s: float) -> dict[str, float]:
        """Answer a request; PeerError if that takes longer."""
        assert self._process is not None and self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        found = self._read(limit_s)
        self._signal(signal.SIGSTOP)
        return found

    def rss_anon_bytes(self) -> int:
        """Memory that is this process's alone: the kernel's RssAnon."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def stop(self) -> None:
        """End the process and what it started."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _read(self, limit_s: float) -> dict[str, Any]:
        """The next line of the process, which has one at most on its way."""
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        line = self._process.stdout.readline() if ready else b""
        if line:
            return json.loads(line)
        self.stop()
        said = self._log.read_text(errors="replace").strip().splitlines() if ready else []
        raise PeerError((said or [f"no answer in {limit_s:.0f} s"])[-1])

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
