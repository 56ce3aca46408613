"""Models of Hugging Face repositories: found in the local cache, or fetched into it.

Cache layout, download, retries and HF_* variables are huggingface_hub's; what to fetch, and what is
said when that fails, is ours. Of a file's contents only config.json matters here: what would not
run is refused before its weights are fetched. No torch.
"""

import contextlib
import errno
import re
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm

from roofline.errors import CapacityError, DownloadError, RooflineError
from roofline.models.checkpoints.hf_config import read_config
from roofline.models.fetch_bar import fetch_bar
from roofline.models.repository import Fetch, ModelFiles, RepoReference, model_files


def locate(reference: RepoReference, revision: str | None, fetch: Fetch) -> Path:
    """Return a model's folder or its (first) GGUF file.

    What the cache holds whole is taken without asking the hub; `download` asks.
    """
    found = _in_cache(reference, revision, weights=fetch == "model")
    if found is not None:
        return found
    if fetch == "nothing":
        raise DownloadError(
            f"{_tried(reference, revision)}; `roofline pull {reference}` fetches it"
        )
    return download(reference, revision, weights=fetch == "model")


def refresh(reference: RepoReference, revision: str | None = None) -> Path:
    """Return a model as the hub has it now; as the cache has it where the hub cannot be asked."""
    try:
        return download(reference, revision)
    except _UnreachableError as error:
        found = _in_cache(reference, revision, weights=True)
        if found is None:
            raise
        print(f"{reference} is as it was: {error.reason}", file=sys.stderr, flush=True)
        return found


def download(
    reference: RepoReference, revision: str | None = None, *, weights: bool = True
) -> Path:
    """Bring a model into the cache as the hub has it now; files that are there stay.

    Without `weights`, of a safetensors model only what describes it.
    """
    with _explained(reference, revision):
        commit, missing = _hub_files(reference.repo, revision)
        chosen = model_files(missing, reference)
        names = chosen.needed(weights=weights)
        _say_choice(reference, chosen)
        snapshot = _storage(reference.repo) / "snapshots" / commit
        with _bar(reference, sum(missing[name] for name in names)) as bar:
            for name in names:
                hf_hub_download(reference.repo, name, revision=commit, tqdm_class=bar)
                if name == "config.json":  # the last before the weights
                    read_config(snapshot)
            # Now that all is here, the cache may learn what the branch means.
            hf_hub_download(reference.repo, names[-1], revision=revision, tqdm_class=bar)
    return snapshot / chosen.main


def cache_folder() -> Path:
    """The folder of the cache, which other programs share."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def _storage(repo: str) -> Path:
    """The repository's own folder in the cache."""
    return cache_folder() / repo_folder_name(repo_id=repo, repo_type="model")


def _in_cache(reference: RepoReference, revision: str | None, *, weights: bool) -> Path | None:
    """Where the cache holds the model whole, if it does."""
    try:
        snapshot = Path(
            snapshot_download(
                reference.repo, revision=revision, local_files_only=True, allow_patterns=[]
            )
        )
    except LocalEntryNotFoundError:
        return None
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    names = {path.relative_to(snapshot).as_posix() for path in paths}
    described = {"config.json", "tokenizer.json"} <= names
    if described and reference.quant is None and not weights:
        return snapshot
    try:
        chosen = model_files(names, reference)
    except RooflineError:  # the hub may have it
        return None
    if chosen.describing and not described:
        return None
    _say_choice(reference, chosen)
    return snapshot / chosen.main


def _hub_files(repo: str, revision: str | None) -> tuple[str, dict[str, int]]:
    """A revision's commit on the hub, and its files with the bytes of each yet to be fetched."""
    try:
        info = HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        if info.sha is None or not re.fullmatch("[0-9a-f]{40}", info.sha):
            raise ValueError("no commit")  # it becomes a part of paths
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{constants.ENDPOINT} does not answer as a Hugging Face hub does; "
            "is HF_ENDPOINT right, or a login in between?"
        ) from error
    blobs = _storage(repo) / "blobs"
    missing: dict[str, int] = {}
    for file in info.siblings or ():
        blob = file.lfs.sha256 if file.lfs else file.blob_id
        here = blob is not None and (blobs / blob).exists()
        missing[file.rfilename] = 0 if here else file.size or 0
    return info.sha, missing


def _say_choice(reference: RepoReference, chosen: ModelFiles) -> None:
    """One line where the reference left open which GGUF file it means."""
    if chosen.main and reference.quant is None:
        others = f"; also here: {', '.join(chosen.others)}" if chosen.others else ""
        print(f"{reference}: takes {chosen.main}{others}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(reference: RepoReference, missing_bytes: int) -> Generator[type[tqdm], None, None]:
    """One bar for all files, as the class of bar that the library is to use for each.

    Refuses at once what the disk cannot hold; shows nothing where nothing is missing.
    """
    folder = cache_folder()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < missing_bytes:
        raise CapacityError(
            f"fetching {reference} needs {missing_bytes / 1e6:,.1f} MB of disk in {folder}, but "
            f"{free / 1e6:,.1f} MB are free; make room or set HF_HUB_CACHE to a folder elsewhere"
        )
    if not missing_bytes:
        yield _silent_bar(lambda count: None)
        return
    line = f"Fetching {reference} ({missing_bytes / 1e6:,.1f} MB) from {constants.ENDPOINT}"
    with fetch_bar(line, bars=not constants.HF_HUB_DISABLE_PROGRESS_BARS) as bar:
        task = bar.add_task(f"Downloading {reference}", total=missing_bytes)
        yield _silent_bar(lambda count: bar.advance(task, count))


def _silent_bar(advance: Callable[[int], None]) -> type[tqdm]:
    """The library's bar of a file, not shown; the bytes that reach the disk go to `advance`."""

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes of the network, which are not those of the file."""

    return Silent


@contextlib.contextmanager
def _explained(reference: RepoReference, revision: str | None) -> Generator[None, None, None]:
    """Turn what the library raises while it fetches into one line."""
    repo, hub = reference.repo, constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo} is gated: ask for access at {hub}/{repo}, then set HF_TOKEN to a token of the "
            "account that has it"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{repo} is no path here, and {hub} has no such repository, or hides it: check the "
            "name, or set HF_TOKEN if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(f"{repo} has no revision {revision!r} on {hub}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "check HF_TOKEN" if status in (401, 403) else "try again later"
        raise DownloadError(f"cannot fetch {reference}: {hub} answered {status}; {hint}") from error
    except (httpx2.TransportError, EntryNotFoundError, OfflineModeIsEnabled) as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        if isinstance(cause, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        elif isinstance(cause, HfHubHTTPError):
            reason = f"it answered {cause.response.status_code}"
        raise _UnreachableError(
            _tried(reference, revision), f"{hub} cannot be asked: {reason:.200}"
        ) from error
    except (OSError, ValueError) as error:
        folder, code = cache_folder(), error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"fetching {reference}: the disk of {folder} is full") from error
        reason = " ".join(str(error).split())
        raise DownloadError(f"cannot fetch {reference} into {folder}: {reason:.300}") from error


class _UnreachableError(DownloadError):
    """The hub could not be asked."""

    def __init__(self, tried: str, reason: str) -> None:
        super().__init__(f"{tried}; {reason}")
        self.reason = reason


def _tried(reference: RepoReference, revision: str | None) -> str:
    """Every place on this machine where the model is not."""
    return (
        f"{reference} is no path here, no built-in model, and {cache_folder()} holds no whole copy "
        f"of its revision {revision or constants.DEFAULT_REVISION!r}"
    )
