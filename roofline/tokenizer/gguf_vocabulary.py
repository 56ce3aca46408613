"""A vocabulary from the `tokenizer.*` keys of a GGUF file, each checked before it is used.

The file is untrusted. How text is cut into words is in `pretokenizers`; how SentencePiece's merges
are rebuilt is in `sentencepiece_bpe`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models

from roofline.errors import CheckpointError, UnsupportedError
from roofline.tokenizer.pretokenizers import pre_tokenizer_rule
from roofline.tokenizer.sentencepiece_bpe import sentencepiece_bpe, sentencepiece_bytes
from roofline.tokenizer.vocabulary import Vocabulary, byte_level_bytes, refusing_bad_vocabulary

Kind = TypeVar("Kind")

# ggml's token types; the others are unused 5, byte 6
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = range(1, 5)
_TYPES = range(1, 7)

_ENDS = ("eos", "eot", "eom")
_TEMPLATE_NAMES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


def vocabulary_from_gguf(metadata: Mapping[str, object], source: str) -> Vocabulary:
    """Check and build; `source` is the file's name for messages."""
    keys = _Keys(metadata, source)
    kind = _kind(keys)
    tokens = _tokens(keys)
    types = _types(keys, len(tokens))
    names = (*_ENDS, *_TEMPLATE_NAMES.values())
    ids = {name: _token_id(keys, name, len(tokens)) for name in names}
    for name, token in kind.usual_ids.items():
        if ids[name] is None and token < len(tokens) and types[token] in (_UNKNOWN, _CONTROL):
            ids[name] = token
    ends = [token for name in _ENDS if (token := ids[name]) is not None]
    named = {*ends} if ids["bos"] is None else {*ends, ids["bos"]}
    bpe = kind.bpe(tokens, types)
    bpe.add_tokens(_added_tokens(tokens, types, named))
    return Vocabulary(
        source=source,
        bpe=bpe,
        size=len(tokens),
        bos_token_id=ids["bos"],
        eos_token_ids=tuple(dict.fromkeys(ends)),
        prefix=_added(keys, "bos", ids, default=kind.adds_bos),
        suffix=_added(keys, "eos", ids, default=False),
        chat_templates=_chat_templates(keys),
        context_tokens=keys.context_tokens,
        template_tokens={
            variable: tokens[token]
            for variable, name in _TEMPLATE_NAMES.items()
            if (token := ids[name]) is not None
        },
        piece_bytes=kind.piece_bytes,
        leads_with_space=kind.leads_with_space,
    )


def _kind(keys: "_Keys") -> "_ByteLevel | _SentencePiece":
    model = keys.require("model", str)
    if model == "gpt2":
        return _ByteLevel(keys)
    if model == "llama":
        return _SentencePiece(keys)
    raise UnsupportedError(
        f"{keys.source}: tokenizer.ggml.model '{model}' is not supported; "
        "supported: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
    )


class _ByteLevel:
    """The model 'gpt2': merges are in the file, and how text is cut before them has a name."""

    usual_ids: Mapping[str, int] = MappingProxyType({})
    leads_with_space = False

    def __init__(self, keys: "_Keys") -> None:
        self._keys = keys
        if keys.get("add_space_prefix", bool):
            raise UnsupportedError(
                f"{keys.source}: tokenizer.ggml.add_space_prefix true is not supported "
                "with model 'gpt2'; supported: false"
            )
        self._rule = pre_tokenizer_rule(keys.require("pre", str), keys.source)
        self.adds_bos = self._rule.adds_bos
        self.piece_bytes = byte_level_bytes

    def bpe(self, tokens: list[str], types: NDArray[np.int64]) -> tokenizers.Tokenizer:
        """Build without added tokens."""
        ids = {token: index for index, token in enumerate(tokens)}
        merges = _merges(self._keys, ids)
        with refusing_bad_vocabulary(self._keys.source):
            model = models.BPE(vocab=ids, merges=merges, ignore_merges=self._rule.ignore_merges)
            bpe = tokenizers.Tokenizer(model)
        bpe.pre_tokenizer = self._rule.split()
        bpe.decoder = decoders.ByteLevel()
        if self._rule.normalizer is not None:
            bpe.normalizer = self._rule.normalizer()
        return bpe


class _SentencePiece:
    """The model 'llama': merges follow from scores; what is not said is as in llama.cpp."""

    usual_ids: Mapping[str, int] = MappingProxyType({"unknown": 0, "bos": 1, "eos": 2})
    adds_bos = True

    def __init__(self, keys: "_Keys") -> None:
        self._keys = keys
        if keys.get("remove_extra_whitespaces", bool):
            raise UnsupportedError(
                f"{keys.source}: tokenizer.ggml.remove_extra_whitespaces true is not supported "
                "with model 'llama'; supported: false"
            )
        normalization = keys.get("precompiled_charsmap", np.ndarray)
        if normalization is not None and normalization.size:
            raise UnsupportedError(
                f"{keys.source}: tokenizer.ggml.precompiled_charsmap is not supported; "
                "supported: text as it is"
            )
        leads = keys.get("add_space_prefix", bool)
        self.leads_with_space = True if leads is None else leads
        self.piece_bytes = sentencepiece_bytes

    def bpe(self, tokens: list[str], types: NDArray[np.int64]) -> tokenizers.Tokenizer:
        """Build without added tokens."""
        scores = np.asarray(self._keys.require("scores", np.ndarray))
        if scores.shape != types.shape or scores.dtype.kind != "f":
            raise self._keys.wrong(
                "scores",
                f"has shape {scores.shape} {scores.dtype}; it needs {len(tokens)} floats",
            )
        strange = np.flatnonzero(~np.isfinite(scores))
        if strange.size:
            index = int(strange[0])
            raise self._keys.wrong(f"scores[{index}]", f"is {scores[index]}; it must be finite")
        unknown = np.flatnonzero(types == _UNKNOWN)
        return sentencepiece_bpe(
            tokens,
            scores.tolist(),
            np.flatnonzero(types == _NORMAL).tolist(),
            unknown=tokens[unknown[0]] if unknown.size else None,
            leads_with_space=self.leads_with_space,
            source=self._keys.source,
        )


class _Keys:
    """Typed look-ups; a name without a dot is one of `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, object], source: str) -> None:
        self._metadata = metadata
        self.source = source

    def get(self, name: str, kind: type[Kind]) -> Kind | None:
        """Return a value, None without the key."""
        value = self._metadata.get(_full(name))
        if value is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(name, f"is {type(value).__name__}; it must be {kind.__name__}")
        return value

    def require(self, name: str, kind: type[Kind]) -> Kind:
        """Return a value that must be there."""
        value = self.get(name, kind)
        if value is None:
            raise self.wrong(name, "is missing")
        return value

    def strings(self, name: str) -> list[str]:
        """Return a list of strings that must be there."""
        values = self.require(name, list)
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise self.wrong(f"{name}[{index}]", f"is {type(value).__name__}; it must be str")
        return values

    @property
    def context_tokens(self) -> int | None:
        """Tokens of context of the model in the file, if there is one."""
        tokens = self._metadata.get(f"{self._metadata.get('general.architecture')}.context_length")
        return tokens if isinstance(tokens, int) else None

    def wrong(self, name: str, fault: str) -> CheckpointError:
        """Say what is wrong with a key."""
        return CheckpointError(f"{self.source}: {_full(name)} {fault}")


def _full(name: str) -> str:
    return name if "." in name else f"tokenizer.ggml.{name}"


def _tokens(keys: _Keys) -> list[str]:
    tokens = keys.strings("tokens")
    if not tokens:
        raise keys.wrong("tokens", "is empty")
    if len(set(tokens)) != len(tokens):
        token, count = Counter(tokens).most_common(1)[0]
        raise keys.wrong("tokens", f"holds {token!r} {count} times; each may be there once")
    return tokens


def _types(keys: _Keys, n_tokens: int) -> NDArray[np.int64]:
    """The type of each token, [n_tokens]."""
    types = np.asarray(keys.require("token_type", np.ndarray))
    if types.shape != (n_tokens,) or types.dtype.kind not in "iu":
        raise keys.wrong(
            "token_type", f"has shape {types.shape} {types.dtype}; it needs {n_tokens} integers"
        )
    strange = np.flatnonzero(~np.isin(types, _TYPES))
    if strange.size:
        index = int(strange[0])
        raise keys.wrong(f"token_type[{index}]", f"is {types[index]}; it must be from 1 to 6")
    return types.astype(np.int64)


def _merges(keys: _Keys, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for index, merge in enumerate(keys.strings("merges")):
        left, _, right = merge.partition(" ")
        for piece in (left, right, left + right):
            if piece not in ids:
                raise keys.wrong(
                    f"merges[{index}]", f"{merge!r} names {piece!r}, which is not in the vocabulary"
                )
        merges.append((left, right))
    return merges


def _added_tokens(
    tokens: Sequence[str], types: NDArray[np.int64], named: Set[int]
) -> list[AddedToken]:
    """Tokens that are found in a text before it is cut into words; the `named` are special."""
    special = {*np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL))).tolist(), *named}
    added = special.union(np.flatnonzero(types == _USER_DEFINED).tolist())
    return [
        AddedToken(tokens[index], special=index in special, normalized=False)
        for index in sorted(added)
    ]


def _chat_templates(keys: _Keys) -> dict[str, str]:
    """The default one, and those for a purpose that `tokenizer.chat_templates` names."""
    default = keys.get("tokenizer.chat_template", str)
    templates = {} if default is None else {"default": default}
    if keys.get("tokenizer.chat_templates", list) is not None:
        for name in keys.strings("tokenizer.chat_templates"):
            templates[name] = keys.require(f"tokenizer.chat_template.{name}", str)
    return templates


def _token_id(keys: _Keys, name: str, n_tokens: int) -> int | None:
    token = keys.get(f"{name}_token_id", int)
    if token is not None and not 0 <= token < n_tokens:
        raise keys.wrong(
            f"{name}_token_id", f"is {token}, outside the vocabulary of {n_tokens} tokens"
        )
    return token


def _added(
    keys: _Keys, name: str, ids: Mapping[str, int | None], *, default: bool
) -> tuple[int, ...]:
    """What `add_bos_token` or `add_eos_token` puts around a text."""
    wanted = keys.get(f"add_{name}_token", bool)
    if not (default if wanted is None else wanted):
        return ()
    token = ids[name]
    if token is None:
        raise keys.wrong(f"{name}_token_id", "is missing, yet every text needs one")
    return (token,)
