"""A program at a pseudo-terminal: what it shows is awaited, what a person would type is sent."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

DEADLINE_S = 120.0  # of each wait: the machine may be busy
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[=>78])")


class Terminal:
    """One program, from its start to its end; on leaving it is killed if it has not ended."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._screen, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=_own_the_terminal,
        )
        os.close(theirs)
        self._raw = b""
        self._seen = 0  # characters of the text that were awaited already

    @property
    def text(self) -> str:
        """All that was shown, without escape sequences."""
        return _ESCAPES.sub("", self._raw.decode(errors="replace"))

    def send(self, keys: str) -> None:
        """Press keys."""
        os.write(self._screen, keys.encode())

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait until text that was not awaited yet matches; AssertionError after a while."""
        until = time.monotonic() + DEADLINE_S
        while True:
            text = self.text
            found = re.search(pattern, text[self._seen :])
            if found is not None:
                self._seen += found.end()
                return found
            assert self._read(until), f"no {pattern!r} in {text[self._seen :]!r}"

    def leave(self, keys: str) -> int:
        """Press keys that end the program; return its exit code."""
        self.send(keys)
        until = time.monotonic() + DEADLINE_S
        while self._read(until):
            pass
        return self._process.wait(timeout=max(until - time.monotonic(), 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._screen)

    def _read(self, until: float) -> bool:
        """Read what is shown next; False at the end of the program or of the time."""
        poll = select.poll()
        poll.register(self._screen, select.POLLIN)
        if not poll.poll(max(until - time.monotonic(), 0) * 1000):
            return False
        try:
            data = os.read(self._screen, 1 << 16)
        except OSError:  # Linux says so when the program has closed its side
            return False
        self._raw += data
        return bool(data)


def _own_the_terminal() -> None:
    """Be who its Ctrl-C reaches, whatever the shell that ran the tests said of SIGINT."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
