"""From what a request wants its text to be like to the matchers that see to it.

A grammar is tried in a child process first (`trial.py`), then compiled here over the model's own
vocabulary and kept for the next who asks for it.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from roofline.errors import RequestError
from roofline.grammars.trial import compiled, failure_of
from roofline.request import SamplingParams
from roofline.sandbox import Sandbox
from roofline.structured_outputs import StructuredOutputsParams, mask_bytes
from roofline.tokenizer import Tokenizer

Bits = NDArray[np.uint8]  # [mask_bytes]: bit i % 8 of byte i // 8 is token i's

_TRIAL = "roofline.grammars.trial"
_TRIAL_S = 1.0
_TRIAL_BYTES = 256 << 20
_CACHED_GRAMMARS = 256  # of some 60 KB each
_CACHED_SOURCE_BYTES = 512 << 10  # large ones take up to 90 times their source


class GrammarCompiler:
    """Compiles for one model; safe between threads. What it holds in memory is bounded."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int], vocab_size: int) -> None:
        self._vocabulary = _Vocabulary(tokenizer, eos_ids, vocab_size)
        self._sandbox = Sandbox(memory_bytes=_TRIAL_BYTES)
        self._lock = threading.Lock()
        self._cache: OrderedDict[StructuredOutputsParams, _Grammar] = OrderedDict()
        self._cached_bytes = 0

    def matchers(
        self, params: SamplingParams, asked: StructuredOutputsParams
    ) -> "list[GrammarMatcher]":
        """One matcher for each of the n answers; RequestError for a grammar nobody can follow."""
        with self._lock:
            grammar = self._grammar(asked)
        allowed = self._vocabulary.allowed(params)
        return [GrammarMatcher(grammar, allowed) for _ in range(params.n)]

    def close(self) -> None:
        """End the child process."""
        self._sandbox.close()

    def _grammar(self, asked: StructuredOutputsParams) -> "_Grammar":
        known = self._cache.pop(asked, None)
        if known is None:
            known = _Grammar.of(self._try(asked), self._vocabulary)
            self._cached_bytes += known.source_bytes
        self._cache[asked] = known
        while len(self._cache) > _CACHED_GRAMMARS or self._cached_bytes > _CACHED_SOURCE_BYTES:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.source_bytes
        return known

    def _try(self, asked: StructuredOutputsParams) -> str:
        """The grammar in Lark, from the child process that has survived compiling it."""
        kind, source, whitespace = _question(asked)
        arguments = {"kind": kind, "source": source, "whitespace": whitespace}
        try:
            return self._sandbox.call(f"{_TRIAL}:trial", arguments, limit_s=_TRIAL_S)
        except TimeoutError:
            fault = f"longer than {_TRIAL_S:g} s"
        except MemoryError:
            fault = f"more than {_TRIAL_BYTES >> 20} MB, or too deep a stack,"
        self._sandbox.start(_TRIAL)  # for the next request: this child has been killed
        raise RequestError(f"{kind} took {fault} to compile; make it simpler")


class GrammarMatcher:
    """A TokenMatcher: one answer's place in a grammar."""

    def __init__(self, grammar: "_Grammar", allowed: "_Allowed") -> None:
        self._grammar, self._allowed = grammar, allowed
        self._matcher: LLMatcher | None = None  # a copy of the grammar's, from the first token on
        text = allowed.text & grammar.first
        if grammar.may_be_empty and (allowed.may_end or not text.any()):
            text |= allowed.ends
        self._mask = _packed(text)

    def mask(self) -> bytes:
        """What may come next."""
        return self._mask

    def accept(self, token: int) -> bool:
        """Take the next token; True when the text is complete and nothing may follow."""
        if self._matcher is None:
            self._matcher = self._grammar.matcher.deep_copy()
        matcher, allowed = self._matcher, self._allowed
        matcher.consume_token(token)
        if matcher.is_stopped() and not matcher.is_error():
            return True
        text = allowed.text & _next(matcher, len(self._mask))
        if matcher.is_accepting():
            if not text.any():
                return True
            if allowed.may_end:
                text |= allowed.ends
        self._mask = _packed(text)
        return False


@dataclass(frozen=True)
class _Grammar:
    """A compiled grammar where no text has come yet."""

    matcher: LLMatcher  # only ever copied
    source_bytes: int
    first: Bits  # tokens the text may begin with
    may_be_empty: bool

    @classmethod
    def of(cls, source: str, vocabulary: "_Vocabulary") -> "_Grammar":
        matcher = compiled(source, vocabulary.tokens())
        first = _next(matcher, vocabulary.mask_bytes)
        return cls(matcher, len(source.encode()), first, matcher.is_accepting())


@dataclass(frozen=True)
class _Allowed:
    """What a request's other parameters leave of the vocabulary."""

    text: Bits
    ends: Bits
    may_end: bool  # whether the text may end where the grammar could go on


class _Vocabulary:
    """A model's tokens as bytes; what llguidance makes of them is built with the first grammar."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int], vocab_size: int) -> None:
        self.mask_bytes = mask_bytes(vocab_size)
        self._tokenizer, self._eos_ids, self._size = tokenizer, list(eos_ids), vocab_size
        self._special_ids = sorted({*tokenizer.special_ids, *eos_ids})
        self._ends = self._bits(self._eos_ids)
        self._text = self._bits(range(vocab_size)) & ~self._bits(self._special_ids)
        self._tokens: LLTokenizer | None = None

    def tokens(self) -> LLTokenizer:
        """The vocabulary as llguidance has it."""
        if self._tokens is None:
            # A model that names no end is given one beyond its vocabulary, which no mask keeps.
            ends = self._eos_ids or [self._size]
            self._tokens = LLTokenizer(
                TokenizerWrapper(
                    _TokenBytes(self._tokenizer, self._size, self._special_ids, ends[0])
                ),
                eos_token=ends,
            )
        return self._tokens

    def allowed(self, params: SamplingParams) -> _Allowed:
        """What a request's parameters leave: special tokens never, but for the ends."""
        params.check(self._size)
        among = np.uint8(0xFF)
        if params.allowed_token_ids is not None:
            among = self._bits(params.allowed_token_ids)
        return _Allowed(self._text & among, self._ends & among, not params.ignore_eos)

    def _bits(self, ids: Sequence[int]) -> Bits:
        bits = np.zeros(self.mask_bytes * 8, dtype=np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little")


class _TokenBytes:
    """A vocabulary in the shape that `TokenizerWrapper` reads: names of its attributes are its own.

    Rows of the embedding beyond the tokenizer's vocabulary have no bytes, so no grammar takes them.
    """

    bos_token_id: int | None = None

    def __init__(
        self, tokenizer: Tokenizer, size: int, special_ids: Sequence[int], eos_id: int
    ) -> None:
        known = min(size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(token) for token in range(known)]
        self.tokens += [b""] * (max(size, eos_id + 1) - known)
        self.special_token_ids, self.eos_token_id = list(special_ids), eos_id

    def __call__(self, text: bytes) -> list[int]:
        """Token ids of a text; grammars that force no tokens never ask."""
        raise NotImplementedError


def _question(asked: StructuredOutputsParams) -> tuple[str, str | Sequence[str], str | None]:
    """The kind of a grammar, its source, and a regex for what may be between parts of JSON."""
    whitespace = "" if asked.disable_any_whitespace else asked.whitespace_pattern
    if asked.json_object:
        return "json", '{"type":"object"}', whitespace
    for kind, source in (("json", asked.json), ("choice", asked.choice), ("regex", asked.regex)):
        if isinstance(source, (str, tuple)):
            return kind, source, whitespace
    assert asked.grammar is not None
    return "grammar", asked.grammar, None


def _packed(bits: Bits) -> bytes:
    if not bits.any():
        raise RequestError(
            "allowed_token_ids leaves no token with which the structured output could go on"
        )
    return bits.tobytes()


def _next(matcher: LLMatcher, size: int) -> Bits:
    """What may come next as `size` bytes; RequestError when the matcher gives up."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)[:size]
    if matcher.is_error():
        raise RequestError(f"the structured output cannot go on: {failure_of(matcher)}")
    return np.pad(bits, (0, size - len(bits)))
