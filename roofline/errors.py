"""Every error Roofline raises on purpose: one small tree.

    RooflineError                 exit 1   anything below
    ├── UsageError                exit 2   an option or a model reference that cannot be meant
    │   ├── UnsupportedError      exit 2   an architecture, tensor type or feature we do not have
    │   └── RequestError          exit 2   a prompt or a sampling parameter out of bounds (a ValueError too)
    ├── CheckpointError           exit 1   a model file that is missing parts, truncated or lying
    ├── DownloadError             exit 1   a model that could not be fetched
    └── CapacityError             exit 1   it does not fit: memory or disk, with what would

A message is one line and the whole answer: what, where, and the nearest thing that works.
"""


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
    """A prompt or sampling parameter out of bounds; names the field and its bounds."""


class CheckpointError(RooflineError):
    """A model file that is missing parts, truncated, or says what is not so; names file and field."""


class DownloadError(RooflineError):
    """A model that could not be fetched; names every place tried."""


class CapacityError(RooflineError):
    """Something does not fit in memory or on disk; says how much would."""
