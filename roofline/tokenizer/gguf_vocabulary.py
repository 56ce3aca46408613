"""A vocabulary from the `tokenizer.*` keys of a GGUF file, each checked before it is used.

The file is untrusted. How text is cut into words is in `pretokenizers`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import TypeVar

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models

from roofline.errors import CheckpointError, UnsupportedError
from roofline.tokenizer.pretokenizers import PreTokenizerRule, pre_tokenizer_rule
from roofline.tokenizer.vocabulary import Vocabulary, refusing_bad_vocabulary

Kind = TypeVar("Kind")

# ggml's token types; the others are normal 1, unused 5, byte 6
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
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
    model = keys.require("model", str)
    if model != "gpt2":
        raise UnsupportedError(
            f"{source}: tokenizer.ggml.model '{model}' is not supported; "
            "supported: gpt2 (byte-level BPE)"
        )
    if keys.get("add_space_prefix", bool):
        raise UnsupportedError(
            f"{source}: tokenizer.ggml.add_space_prefix true is not supported "
            "with model 'gpt2'; supported: false"
        )
    rule = pre_tokenizer_rule(keys.require("pre", str), source)
    tokens = _tokens(keys)
    names = (*_ENDS, *_TEMPLATE_NAMES.values())
    ids = {name: _token_id(keys, name, len(tokens)) for name in names}
    ends = [token for name in _ENDS if (token := ids[name]) is not None]
    named = {*ends} if ids["bos"] is None else {*ends, ids["bos"]}
    bpe = _bpe(keys, tokens, rule)
    bpe.add_tokens(_added_tokens(keys, tokens, named))
    return Vocabulary(
        source=source,
        bpe=bpe,
        size=len(tokens),
        bos_token_id=ids["bos"],
        eos_token_ids=tuple(dict.fromkeys(ends)),
        prefix=_added(keys, "bos", ids, default=rule.adds_bos),
        suffix=_added(keys, "eos", ids, default=False),
        chat_template=keys.get("tokenizer.chat_template", str),
        template_tokens={
            variable: tokens[token]
            for variable, name in _TEMPLATE_NAMES.items()
            if (token := ids[name]) is not None
        },
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


def _bpe(keys: _Keys, tokens: list[str], rule: PreTokenizerRule) -> tokenizers.Tokenizer:
    ids = {token: index for index, token in enumerate(tokens)}
    with refusing_bad_vocabulary(keys.source):
        model = models.BPE(vocab=ids, merges=_merges(keys, ids), ignore_merges=rule.ignore_merges)
        bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = rule.split()
    bpe.decoder = decoders.ByteLevel()
    if rule.normalizer is not None:
        bpe.normalizer = rule.normalizer()
    return bpe


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


def _added_tokens(keys: _Keys, tokens: Sequence[str], named: Set[int]) -> list[AddedToken]:
    """Tokens that are found in a text before it is cut into words; the `named` are special."""
    types = np.asarray(keys.require("token_type", np.ndarray))
    if types.shape != (len(tokens),) or types.dtype.kind not in "iu":
        raise keys.wrong(
            "token_type", f"has shape {types.shape} {types.dtype}; it needs {len(tokens)} integers"
        )
    strange = np.flatnonzero(~np.isin(types, _TYPES))
    if strange.size:
        index = int(strange[0])
        raise keys.wrong(f"token_type[{index}]", f"is {types[index]}; it must be from 1 to 6")
    special = {*np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL))).tolist(), *named}
    added = special.union(np.flatnonzero(types == _USER_DEFINED).tolist())
    return [
        AddedToken(tokens[index], special=index in special, normalized=False)
        for index in sorted(added)
    ]


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
