"""What tests run in a sandbox: work that goes wrong in every way."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from roofline.errors import RequestError


def echo(value: Any) -> Any:
    """Give back what was given."""
    return value


def loop() -> NoReturn:
    """Never end."""
    while True:
        pass


def one_long_operation() -> int:
    """Spend hours in C, without a look at signals or other threads."""
    return 7 ** (7**12)


def take(n_bytes: int) -> int:
    """Hold so much memory."""
    return len(b"x" * n_bytes)


def crash() -> NoReturn:
    """End as a segmentation fault does."""
    os.abort()


def refuse() -> NoReturn:
    """Raise an error of ours."""
    raise RequestError("messages[0] is bad")


def fail() -> NoReturn:
    """Raise an error that is a mistake."""
    raise KeyError("oh\nno")


def write_on_stdout() -> str:
    """Print, and read what others are to read."""
    print("not an answer")
    os.write(1, b"nor this")
    return sys.stdin.read()


def process_id() -> int:
    """Name the process."""
    return os.getpid()


def surroundings() -> dict[str, Any]:
    """What the process has of its parent."""
    files = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.exists()]
    return {"files": files, "modules": sorted(sys.modules), "environment": sorted(os.environ)}
