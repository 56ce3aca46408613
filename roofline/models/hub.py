"""What a model reference means: a path, a built-in name, or a Hugging Face repository.

The order of looking is here, fetching in `builtin` and `huggingface`; the latter is imported only
for a reference that needs it. No file is opened to see what it holds. No torch.
"""

import difflib
from pathlib import Path

from roofline import models
from roofline.config import PRESETS
from roofline.errors import CheckpointError, UsageError, shown
from roofline.models import builtin
from roofline.models.builtin import BUILTIN_MODELS, BuiltinModel
from roofline.models.repository import Fetch, RepoReference, check_revision


def resolve(reference: str, *, revision: str | None = None, fetch: Fetch = "model") -> Path:
    """Return the file or folder that `reference` means, fetched if need and `fetch` be.

    `revision` is a branch, a tag or a commit of a repository.
    """
    meant = parse(reference, revision)
    if isinstance(meant, Path):
        return meant
    if isinstance(meant, BuiltinModel):
        return builtin.locate(meant, may_fetch=fetch != "nothing")
    return models.huggingface.locate(meant, revision, fetch)


def pull(reference: str, *, revision: str | None = None) -> Path:
    """Fetch what a name means, as it is today where it comes from; return its file or folder."""
    meant = parse(reference, revision)
    if isinstance(meant, Path):
        raise UsageError(f"{reference} is a path: there is nothing to fetch")
    if isinstance(meant, BuiltinModel):
        return builtin.locate(meant)
    return models.huggingface.refresh(meant, revision)


def parse(reference: str, revision: str | None = None) -> Path | BuiltinModel | RepoReference:
    """Tell what kind of thing is named: what exists here, else a built-in model or a repository."""
    check_revision(revision)
    meant = _existing(reference) or BUILTIN_MODELS.get(reference) or RepoReference.parse(reference)
    if revision is not None and not isinstance(meant, RepoReference):
        raise UsageError(
            f"revision {revision!r} does nothing: {shown(reference)} is no Hugging Face repository"
        )
    if meant is None:
        raise UsageError(_unknown(reference))
    return meant


def _existing(reference: str) -> Path | None:
    """Return the path of that name, or None where there is none."""
    if not reference:
        raise UsageError(f"the model reference is empty; {_accepted()}")
    path = Path(reference)
    try:
        if not path.exists():
            return None
        if path.is_dir():
            if not any(path.iterdir()):
                raise CheckpointError(f"model folder {reference!r} is empty")
        elif not path.is_file():
            raise UsageError(f"model {reference!r} is neither a file nor a folder; {_accepted()}")
        elif path.stat().st_size == 0:
            raise CheckpointError(f"model file {reference!r} is empty")
    except OSError as error:
        raise UsageError(
            f"model {reference!r:.200} cannot be read: {error.strerror}; {_accepted()}"
        ) from error
    return path


def _unknown(reference: str) -> str:
    """Say why `reference` means nothing and what is nearest to it."""
    if reference in PRESETS:
        return (
            f"'{reference}' is a shape without weights: it runs with --load-format dummy "
            "(load_format='dummy' in Python)"
        )
    names = [*BUILTIN_MODELS, *PRESETS]
    near = difflib.get_close_matches(reference, names, n=1, cutoff=0.5)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return (
        f"model {reference!r:.200} is not an existing path nor a built-in name{hint}; {_accepted()}"
    )


def _accepted() -> str:
    return (
        "give the path of a .gguf file, of a llama2.c .bin file or of a safetensors folder, "
        "a Hugging Face repository (org/repo or org/repo:Q8_0), "
        f"or a built-in name: {', '.join(BUILTIN_MODELS)}"
    )
