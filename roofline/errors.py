"""Every error Roofline raises on purpose: one small tree.

    RooflineError                 exit 1   anything below
    ├── UsageError                exit 2   an option or a model reference that cannot be meant
    │   ├── UnsupportedError      exit 2   an architecture, tensor type or feature we do not have
    │   └── RequestError          exit 2   a prompt or parameter out of bounds (a ValueError too)
    ├── CheckpointError           exit 1   a model file that is missing parts, truncated or lying
    ├── DownloadError             exit 1   a model that could not be fetched
    ├── CapacityError             exit 1   it does not fit: memory or disk, with what would
    └── EngineError               exit 1   a step failed or the engine was closed: an answer is lost

A message is one line and the whole answer: what, where, and the nearest thing that works.
"""

import reprlib


class RooflineError(Exception):
    """The root; `exit_code` is what the command line leaves with."""

    exit_code = 1

    @property
    def message(self) -> str:
        """The one line a person reads."""
        return str(self.args[0]) if self.args else type(self).__name__


class UsageError(RooflineError):
    """An option or a model reference that cannot be meant."""

    exit_code = 2


class UnsupportedError(UsageError):
    """An architecture, tensor type or feature Roofline does not have; names those it has."""


class RequestError(UsageError, ValueError):
    """A prompt or sampling parameter out of bounds; names the field and its bounds.

    For programs, `param` is that field, and `code` the kind of refusal where they act on it.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class CheckpointError(RooflineError):
    """A model file that lacks parts, is truncated, or says what is not so; names file and field."""


class DownloadError(RooflineError):
    """A model that could not be fetched; names every place tried."""


class CapacityError(RooflineError):
    """Something does not fit in memory or on disk; says how much would."""


class EngineError(RooflineError):
    """An answer was lost through no fault of its request; says why. Asking again may help."""


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and cut whatever its size."""
    return " ".join(_short.repr(value).split())


class _Short(reprlib.Repr):
    # An @override, but typing has none before Python 3.12.
    def repr_int(self, x: int, level: int) -> str:  # pyrefly: ignore[missing-override-decorator]
        """Tell the size of an integer too long to print (Python refuses above 4,300 digits)."""
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


_short = _Short()
_short.maxstring = _short.maxother = 60
