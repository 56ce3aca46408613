"""Finding, opening and checking the compiled library; which of its ISAs runs here and why.

A missing or stale library is a reason in words, never an exception: the reference ops stand in.
"""

import ctypes
import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from roofline.errors import UsageError
from roofline.ops.cpu import abi

_CPU_INFO = Path("/proc/cpuinfo")
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_NAME = ("" if sys.platform == "win32" else "lib") + "roofline_native" + _SUFFIX


@dataclass(frozen=True)
class Library:
    """The opened library: its functions by name, and the ISA that ops are to use."""

    functions: ctypes.CDLL
    path: Path
    isas: tuple[str, ...]  # those this CPU runs, best first
    isa: int  # index of the chosen one

    @property
    def isa_name(self) -> str:
        """What the chosen ISA is called."""
        return self.isas[self.isa]


def open_library(isa: str | None = None) -> Library | str:
    """The library with an ISA (default: the best this CPU runs), or a line of why there is none.

    UsageError for an ISA that this CPU or this build has not.
    """
    found = _open_first()
    if isinstance(found, str):
        return found
    functions, path = found
    isas = tuple(_isas(functions))
    if isa is not None and isa not in isas:
        raise UsageError(
            f"cpu_isa is '{isa}', which this CPU or this build cannot run; here: {', '.join(isas)}"
        )
    return Library(functions, path, isas, isas.index(isa) if isa else 0)


def has_slow_bfloat16() -> bool:
    """Whether this CPU's dot products in bfloat16 are slower than its float32 products: Intel's.

    On two cores of a Xeon with AMX 78 against 152 GMAC/s; AMD's are twice as fast as float32's.
    """
    try:
        about = _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "GenuineIntel" in about


def _open_first() -> tuple[ctypes.CDLL, Path] | str:
    """The first library in place that can be opened and is of this version."""
    why = (
        "the native kernels are not built: install a C++ compiler (Debian: apt install g++) and "
        "Roofline again"
    )
    for path in _candidates():
        if not path.exists():
            continue
        try:
            functions = ctypes.CDLL(str(path))
            version = _declare(functions)
        except (OSError, AttributeError) as error:
            why = f"{path} cannot be opened: {error}; install Roofline again"
            continue
        if version == abi.VERSION:
            return functions, path
        why = f"{path} has ABI {version}, not {abi.VERSION}; install Roofline again"
    return why


def _candidates() -> Iterator[Path]:
    """Beside this package (a wheel, or `make native`), then where an editable install put it."""
    yield Path(__file__).parents[1] / _NAME
    try:
        distribution = importlib.metadata.distribution("roofline")
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        return
    yield Path(str(distribution.locate_file(f"roofline/ops/{_NAME}")))


def _declare(functions: ctypes.CDLL) -> int:
    """Give every function its types; return the ABI's version. AttributeError for one missing."""
    functions.roofline_abi_version.restype = ctypes.c_int
    version = functions.roofline_abi_version()
    if version == abi.VERSION:
        for name, (result, arguments) in abi.SIGNATURES.items():
            function = getattr(functions, name)
            function.restype, function.argtypes = result, arguments
    return version


def _isas(functions: ctypes.CDLL) -> Iterator[str]:
    index = 0
    while (name := functions.roofline_isa(index)) is not None:
        yield name.decode()
        index += 1
