"""A memory map of an untrusted file, made only where mapping it cannot wait or fail without words.

No format is known here.
"""

import mmap
import stat
from pathlib import Path

from roofline.errors import CheckpointError


def map_file(path: Path, wanted: str) -> mmap.mmap:
    """Map a regular file that holds something; CheckpointError says what is there in its place.

    As with any memory map, a file that someone truncates while it is open kills its reader.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a FIFO would wait for its writer
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise CheckpointError(f"{path}: is {kind}; {wanted} is needed")
        with path.open("rb") as file:
            if not file.read(1):
                raise CheckpointError(f"{path}: is empty; {wanted} is needed")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None
