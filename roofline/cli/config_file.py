"""`--config FILE`: options in a TOML or JSON file, by their names on the command line.

Names and types are checked here, where the file can be named; how options go together is checked
where they are used, whichever door they came by.
"""

import difflib
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from roofline.config import EngineConfig, check_option, option_path
from roofline.errors import CheckpointError, RequestError, UsageError, shown
from roofline.models.checkpoints.json_fields import parse_json
from roofline.request import SamplingParams

_MAX_BYTES = 1 << 20
_KINDS = "a file that ends in .toml or .json"


def read_config_file(name: str, sampling: Collection[str]) -> dict[str, Any]:
    """The options a file gives: any of EngineConfig's, and those of SamplingParams in `sampling`.

    UsageError names the file and the key of what is no option, or no value of one.
    """
    path = option_path("--config", name, _KINDS)
    known = [*EngineConfig.__dataclass_fields__, *sampling]
    found: dict[str, Any] = {}
    for key, value in _read(path).items():
        option = key.replace("-", "_")
        if option in found:
            raise UsageError(f"{path}: gives {option} twice, as {key!r} too")
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else "`roofline run --help` lists them"
            raise UsageError(f"{path}: unknown option {shown(key)}; {hint}")
        _check(path, option, value)
        found[option] = value
    return found


def _check(path: Path, option: str, value: Any) -> None:
    if option in EngineConfig.__dataclass_fields__:
        check_option(option, value, f"{path}: {option}")
        return
    try:
        SamplingParams(**{option: value})
    except RequestError as error:
        raise UsageError(f"{path}: {error.message}") from None


def _read(path: Path) -> dict[str, Any]:
    """The file as a mapping."""
    try:
        if not path.is_file():  # opening a FIFO would wait for its writer
            raise UsageError(f"{path}: not a regular file; give {_KINDS}")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path}: more than {_MAX_BYTES:,} bytes, too many for options")
    if path.suffix == ".json":
        try:
            return parse_json(data, str(path))
        except CheckpointError as error:
            raise UsageError(error.message) from None
    if path.suffix != ".toml":
        raise UsageError(f"{path}: is neither TOML nor JSON by its name; give {_KINDS}")
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from None
