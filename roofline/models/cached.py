"""What has been fetched and could run: built-in models and Hugging Face repositories, and its end.

Files are told by their names and sizes; of a safetensors model the config is read. No torch.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CachedFileInfo,
    CachedRepoInfo,
    CachedRevisionInfo,
    HFCacheInfo,
    scan_cache_dir,
)
from huggingface_hub.errors import CacheNotFound

from roofline.errors import RooflineError, UsageError
from roofline.models.builtin import BUILTIN_MODELS, BuiltinModel, builtin_path
from roofline.models.checkpoints.hf_config import read_config
from roofline.models.hub import parse
from roofline.models.huggingface import cache_folder
from roofline.models.repository import RepoReference, gguf_models, model_files, safetensors_weights


@dataclass(frozen=True)
class CachedModel:
    """A model that runs without network."""

    reference: str
    revision: str | None  # a branch or tag if one is known, else the commit; None: it is built in
    format: str
    size_bytes: int
    modified: float  # seconds since 1970
    path: Path

    def report(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "reference": self.reference,
            "revision": self.revision,
            "format": self.format,
            "bytes": self.size_bytes,
            "modified": self.modified,
            "path": str(self.path),
        }


@dataclass(frozen=True)
class Removal:
    """Files to remove, and how."""

    size_bytes: int
    execute: Callable[[], None]


def cached_models() -> list[CachedModel]:
    """Everything runnable in both caches, by name."""
    builtin = [found for model in BUILTIN_MODELS.values() if (found := _builtin(model))]
    repos = (repo for repo in _scan().repos if repo.repo_type == "model")
    found = (model for repo in repos for each in repo.revisions for model in _models(repo, each))
    return sorted([*builtin, *found], key=lambda model: (model.reference, model.revision or ""))


def plan_removal(reference: str, revision: str | None = None) -> Removal:
    """What removing a built-in model, a repository, one revision or one GGUF model of it takes."""
    meant = parse(reference, revision)
    if isinstance(meant, Path):
        raise UsageError(f"{reference} is a path; `roofline rm` removes only what was fetched")
    if isinstance(meant, BuiltinModel):
        path = builtin_path(meant)
        if not path.exists():
            raise UsageError(f"{reference} is not here; `roofline ls` lists what is")
        return Removal(path.stat().st_size, path.unlink)
    scan = _scan()
    for repo in scan.repos:
        if (repo.repo_type, repo.repo_id) == ("model", meant.repo):
            own = dataclasses.replace(scan, repos=frozenset({repo}))
            return _repository_removal(own, repo, meant, revision)
    raise UsageError(f"{reference} is not here; `roofline ls` lists what is")


def _scan() -> HFCacheInfo:
    try:
        return scan_cache_dir(cache_folder())
    except CacheNotFound:
        return HFCacheInfo(
            size_on_disk=0, repos=frozenset(), incomplete_files=frozenset(), warnings=[]
        )


def _builtin(model: BuiltinModel) -> CachedModel | None:
    path = builtin_path(model)
    if not path.exists() or path.stat().st_size != model.size_bytes:
        return None
    (quant,) = gguf_models([model.member])
    status = path.stat()
    return CachedModel(model.name, None, f"gguf {quant}", status.st_size, status.st_mtime, path)


def _models(repo: CachedRepoInfo, revision: CachedRevisionInfo) -> Iterator[CachedModel]:
    """The models of one commit."""
    root, files = revision.snapshot_path, _files(revision)
    name = "main" if "main" in revision.refs else min(revision.refs, default=revision.commit_hash)

    def model(reference: str, format: str, weights: Iterable[str], path: Path) -> CachedModel:
        held = [files[name] for name in weights]
        size = sum(file.size_on_disk for file in held)
        modified = max(file.blob_last_modified for file in held)
        return CachedModel(reference, name, format, size, modified, path)

    weights = safetensors_weights(files)
    if weights and "tokenizer.json" in files and (kind := _safetensors_kind(root)):
        yield model(repo.repo_id, kind, weights, root)
    for quant, parts in gguf_models(files).items():
        yield model(f"{repo.repo_id}:{quant}", f"gguf {quant}", parts, root / parts[0])


def _safetensors_kind(folder: Path) -> str | None:
    """What a folder's model is, None where its config is not one that runs."""
    try:
        _, groups = read_config(folder)
    except RooflineError:
        return None
    return "safetensors int8" if groups else "safetensors"


def _repository_removal(
    scan: HFCacheInfo, repo: CachedRepoInfo, reference: RepoReference, revision: str | None
) -> Removal:
    """By the library's strategy, which keeps what other revisions share."""
    meant = [each for each in repo.revisions if revision in (None, each.commit_hash, *each.refs)]
    if not meant:
        known = ", ".join(sorted(ref for each in repo.revisions for ref in each.refs))
        raise UsageError(f"{reference} is not here in revision {revision!r}; here: {known}")
    files = {
        (each.commit_hash, name): file for each in meant for name, file in _files(each).items()
    }
    if reference.quant is not None:
        chosen = model_files({name for _, name in files}, reference).weights
        files = {key: file for key, file in files.items() if key[1] in chosen}
    if len(files) < sum(len(each.files) for each in meant):
        strategy = scan.delete_files(*files.values())
    else:
        strategy = scan.delete_revisions(*(each.commit_hash for each in meant))
    return Removal(strategy.expected_freed_size, strategy.execute)


def _files(revision: CachedRevisionInfo) -> dict[str, CachedFileInfo]:
    """The files of one commit by their paths in the repository."""
    root = revision.snapshot_path
    return {file.file_path.relative_to(root).as_posix(): file for file in revision.files}
