"""Models of Hugging Face repositories: found in the local cache, or fetched into it.

Cache layout, download, retries and HF_* variables are huggingface_hub's; what to fetch, and what is
said when that fails, is ours. No file is opened to see what it holds. No torch.
"""

import contextlib
import errno
import glob
import shutil
import sys
from collections.abc import Collection, Generator
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from roofline.errors import CapacityError, DownloadError, RooflineError
from roofline.models.repository import Fetch, ModelFiles, RepoReference, model_files


def locate(reference: RepoReference, revision: str | None, fetch: Fetch) -> Path:
    """Return a model's folder or its (first) GGUF file.

    What is whole in the cache needs no network; when the hub was last asked decides what a branch
    means, and `download` asks anew.
    """
    snapshot = cached_snapshot(reference.repo, revision)
    weights = fetch == "model"
    if snapshot is not None:
        found = _in_snapshot(snapshot, _listing(reference.repo, snapshot), reference, weights)
        if found is not None:
            return found
    try:
        if fetch == "nothing":
            raise DownloadError(_not_here(reference, revision))
        return download(reference, revision, weights=weights)
    except DownloadError:  # what else there is may do: another quantisation, say
        if snapshot is not None:
            found = _in_snapshot(snapshot, files_below(snapshot), reference, weights)
            if found is not None:
                return found
        raise


def download(
    reference: RepoReference, revision: str | None = None, *, weights: bool = True
) -> Path:
    """Bring a model into the cache as the hub has it now; files that are there stay.

    Without `weights`, of a safetensors model only what describes it.
    """
    with _explained(reference, revision):
        missing = _missing_bytes(reference.repo, revision)
        chosen = model_files(missing, reference)
        names = chosen.needed(weights=weights)
        _say_choice(reference, chosen)
        _announce(reference, sum(missing[name] for name in names))
        snapshot = snapshot_download(
            reference.repo, revision=revision, allow_patterns=[glob.escape(name) for name in names]
        )
        return Path(snapshot, chosen.main)


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of what the cache has of a revision, whole or not; None if it has nothing."""
    try:
        return Path(
            snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
        )
    except LocalEntryNotFoundError:
        return None


def files_below(snapshot: Path) -> list[str]:
    """The files of a snapshot, by their paths in the repository."""
    return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]


def cache_folder() -> Path:
    """The folder of the cache, which other programs share."""
    return Path(constants.HF_HUB_CACHE).expanduser()


def _in_snapshot(
    snapshot: Path, names: Collection[str], reference: RepoReference, weights: bool
) -> Path | None:
    """Where the model is in a snapshot of a repository of these files; None unless it is whole."""
    try:
        chosen = model_files(names, reference)
    except RooflineError:  # the hub may have more today
        return None
    if not all((snapshot / name).is_file() for name in chosen.needed(weights=weights)):
        return None
    _say_choice(reference, chosen)
    return snapshot / chosen.main


def _listing(repo: str, snapshot: Path) -> list[str]:
    """All files of the repository at that commit, or what is nearest to knowing them."""
    try:
        return [file.path for file in get_cached_repo_tree(repo, revision=snapshot.name)]
    except CachedRepoTreeNotFoundError:  # another program fetched what it needed, perhaps less
        return [*files_below(snapshot), "tokenizer.json"]


def _missing_bytes(repo: str, revision: str | None) -> dict[str, int]:
    """The repository's files on the hub, and how many bytes of each have yet to be fetched."""
    try:
        info = HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{constants.ENDPOINT} does not answer as a Hugging Face hub does; "
            "is HF_ENDPOINT right, or a login page in between?"
        ) from error
    blobs = cache_folder() / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    missing: dict[str, int] = {}
    for file in info.siblings or ():
        blob = file.lfs.sha256 if file.lfs else file.blob_id
        here = blob is not None and (blobs / blob).exists()
        missing[file.rfilename] = 0 if here else file.size or 0
    return missing


def _say_choice(reference: RepoReference, chosen: ModelFiles) -> None:
    """One line where the reference left open which of several GGUF files it means."""
    if chosen.others and reference.quant is None:
        print(
            f"{reference}: takes {chosen.main}; name another as {reference}:QUANT: "
            f"{', '.join(chosen.others)}",
            file=sys.stderr,
            flush=True,
        )


def _announce(reference: RepoReference, missing_bytes: int) -> None:
    """Refuse what the disk cannot hold; off a terminal, where there are no bars, say what comes."""
    folder = cache_folder()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if free < missing_bytes:
        raise CapacityError(
            f"fetching {reference} needs {missing_bytes / 1e6:,.0f} MB of disk in {folder}, but "
            f"{free / 1e6:,.0f} MB are free; make room or set HF_HUB_CACHE to a folder elsewhere"
        )
    if missing_bytes and not (sys.stderr and sys.stderr.isatty()):
        line = f"Fetching {reference} ({missing_bytes / 1e6:,.1f} MB) from {constants.ENDPOINT}"
        print(line, file=sys.stderr, flush=True)


def _not_here(reference: RepoReference, revision: str | None) -> str:
    return f"{_tried(reference, revision)}; `roofline pull {reference}` fetches it"


def _unreachable(reference: RepoReference, revision: str | None, error: Exception) -> str:
    """Name every place where the model was looked for."""
    if isinstance(error.__cause__ or error, OfflineModeIsEnabled):
        return f"{_tried(reference, revision)}; {constants.ENDPOINT} was not asked: HF_HUB_OFFLINE"
    reason = " ".join(str(error.__cause__ or error).split())
    return f"{_tried(reference, revision)}; {constants.ENDPOINT} cannot be reached: {reason:.200}"


def _tried(reference: RepoReference, revision: str | None) -> str:
    return (
        f"{reference} is no path here, no built-in model, and {cache_folder()} holds no whole copy "
        f"of its revision {revision or constants.DEFAULT_REVISION!r}"
    )


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
        hint = "; check HF_TOKEN" if status in (401, 403) else "; try again later"
        raise DownloadError(f"cannot fetch {reference}: {hub} answered {status}{hint}") from error
    except (httpx2.TransportError, EntryNotFoundError, OfflineModeIsEnabled) as error:
        raise DownloadError(_unreachable(reference, revision, error)) from error
    except OSError as error:
        folder = cache_folder()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"fetching {reference}: the disk of {folder} is full") from error
        raise DownloadError(
            f"cannot keep {reference} in {folder}: {error.strerror or error}"
        ) from error
