"""A Hugging Face repository by its name and its list of files: which of them make a model.

Names only: nothing is fetched, opened or looked for here. Names are untrusted, a reference's as
much as those in a repository.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Self

from roofline.errors import DownloadError, UnsupportedError, UsageError, shown

# What may be fetched: all it takes to run, the shape and the tokenizer if they come apart, nothing.
Fetch = Literal["model", "config", "nothing"]


@dataclass(frozen=True)
class RepoReference:
    """`org/repo`, and which of its GGUF files: `org/repo:QUANT`."""

    repo: str
    quant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return what `text` names, None where it cannot be the name of a repository."""
        match = _REFERENCE.fullmatch(text)
        if match is None or ".." in text or "--" in match["repo"]:
            return None
        if PurePosixPath(match["repo"]).suffix in _FILE_SUFFIXES:  # of a path that is not there
            return None
        return cls(match["repo"], match["quant"])

    def __str__(self) -> str:
        return self.repo if self.quant is None else f"{self.repo}:{self.quant}"


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model in a repository, by their paths in it."""

    weights: tuple[str, ...]
    describing: tuple[str, ...] = ()  # tokenizer and, last, config, where weights hold neither
    others: tuple[str, ...] = ()  # GGUF models that could have been meant as well

    @property
    def main(self) -> str:
        """What names the model: its first GGUF file, or nothing for the folder as a whole."""
        return "" if self.describing else self.weights[0]

    def needed(self, *, weights: bool) -> tuple[str, ...]:
        """The files to have; without `weights`, to know the model's shape and its tokenizer."""
        return self.describing + self.weights if weights or not self.describing else self.describing


def check_revision(revision: str | None) -> None:
    """Refuse what cannot be a branch, a tag or a commit, before it becomes a part of a path."""
    if revision is None or (
        _REVISION.fullmatch(revision) and ".." not in revision and "//" not in revision
    ):
        return
    raise UsageError(f"revision is {shown(revision)}; it must be a branch, a tag or a commit hash")


def model_files(names: Collection[str], reference: RepoReference) -> ModelFiles:
    """Choose the model that `reference` means among a repository's files.

    Safetensors where there are some and no quantisation was asked for, else GGUF.
    """
    _refuse_escapes(names, reference.repo)
    weights = safetensors_weights(names)
    if weights and reference.quant is None:
        describing = sorted(filter(_DESCRIBING.fullmatch, names), key=lambda n: n == "config.json")
        return ModelFiles(weights, tuple(describing))
    found = gguf_models(names)
    if found:
        chosen = _chosen(found, reference)
        return ModelFiles(found[chosen], others=tuple(name for name in found if name != chosen))
    if weights:
        raise UsageError(
            f"{reference}: the repository has no complete GGUF file; {reference.repo} is its "
            "safetensors model"
        )
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    hint = f"; {shown(pickles[0])} is a pickle, which is never loaded" if pickles else ""
    raise UnsupportedError(
        f"{reference}: the repository has neither a complete GGUF file nor model.safetensors with "
        f"a config.json{hint}"
    )


def safetensors_weights(names: Collection[str]) -> tuple[str, ...]:
    """The files of the safetensors model in a folder, with their index; none without a config."""
    if "config.json" not in names:
        return ()
    if _SINGLE in names:
        return (_SINGLE,)
    shards = _complete([name for name in names if "/" not in name], ".safetensors").get("model")
    return (_INDEX, *shards) if shards and _INDEX in names else ()


def gguf_models(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The files of every complete GGUF model, by what tells it from the others.

    That is its quantisation, or its whole name where two share one.
    """
    files = {
        stem: parts
        for stem, parts in _complete(names, ".gguf").items()
        if not PurePosixPath(stem).name.lower().startswith(_NO_MODELS)
    }
    quants = {stem: _quantisation(stem) for stem in files}
    shared = Counter(quant.upper() for quant in quants.values())
    return {
        quant if shared[quant.upper()] == 1 else stem.replace("/", "-"): files[stem]
        for stem, quant in sorted(quants.items())
    }


def _chosen(found: Mapping[str, tuple[str, ...]], reference: RepoReference) -> str:
    """The key of the model that `reference` means."""
    if reference.quant is not None:
        quant = reference.quant.upper()
        fitting = [name for name in found if name.upper() == quant]
        wanted = _parts(quant)
        fitting = fitting or [name for name, files in found.items() if _holds(files[0], wanted)]
    else:
        by_name = {name.upper(): name for name in found}
        fitting = [by_name[quant] for quant in _PREFERENCE if quant in by_name][:1] or [*found]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        fault = f"the repository has no GGUF file of {reference.quant!r}; it has"
    else:
        fault = "several GGUF files are meant; name one of"
    raise UsageError(f"{reference}: {fault}: {', '.join(fitting or found)}")


def _complete(names: Collection[str], suffix: str) -> dict[str, tuple[str, ...]]:
    """Files of a kind by their stem: single ones, and split ones of which no part is missing."""
    groups: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for name in names:
        if name.lower().endswith(suffix):
            stem = name[: -len(suffix)]
            split = _SPLIT.fullmatch(stem)
            groups[(split["stem"], int(split["parts"])) if split else (stem, 1)].append(name)
    return {
        stem: tuple(sorted(files)) for (stem, parts), files in groups.items() if len(files) == parts
    }


def _quantisation(stem: str) -> str:
    """The part of a file's name that says how it is quantised, else the whole name."""
    parts = _parts(stem)
    for index in range(len(parts) - 1, -1, -1):
        if _QUANT.fullmatch(parts[index]):
            dynamic = index > 0 and parts[index - 1].upper() == "UD"
            return "-".join(parts[index - dynamic : index + 1])
    return PurePosixPath(stem).name


def _holds(file: str, wanted: list[str]) -> bool:
    """Whether the parts of a file's name hold these, side by side."""
    parts = _parts(file.upper())
    return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts)))


def _parts(name: str) -> list[str]:
    return re.split(r"[-./]", name)


def _refuse_escapes(names: Collection[str], repo: str) -> None:
    """No file of a repository may lie outside of it."""
    for name in names:
        parts = re.split(r"[/\\]", name)
        if {"", ".", ".."} & {*parts} or ":" in parts[0] or not name.isprintable():
            raise DownloadError(f"{repo}: refused: it lists a file named {shown(name)}")


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FILE_SUFFIXES = (".gguf", ".bin", ".safetensors", ".json", ".git")
_NO_MODELS = ("mmproj", "imatrix")  # GGUF files of something else

_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_REFERENCE = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?::(?P<quant>{_NAME}))?", re.ASCII)
_REVISION = re.compile(r"\w[\w.+/-]{0,254}", re.ASCII)
_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<parts>\d{5})")
_DESCRIBING = re.compile(
    r"config\.json|generation_config\.json|tokenizer[\w.-]*\.json|chat_template\.(jinja|json)"
)
_QUANT = re.compile(r"I?Q\d_\w+|TQ\d_\d|MXFP4\w*|NVFP4|BF16|FP?16|FP?32", re.IGNORECASE)
_PREFERENCE = (  # where nothing is said: the nearest to our own INT8, then by what is lost
    *("Q8_0", "Q4_K_M", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_S", "Q5_1", "Q5_0", "Q4_1", "Q4_0"),
    *("BF16", "F16", "FP16", "F32", "FP32"),
)
