"""Compiled grammars over a model's vocabulary, and the matchers that follow an answer in one.

A token is its bytes here, whatever the kind of tokenizer: what a text may be is a matter of bytes,
and of several ways to spell it the model chooses. Special tokens are no text.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from roofline.errors import RequestError
from roofline.grammars.trial import compiled, failure_of
from roofline.request import SamplingParams
from roofline.structured_outputs import mask_bytes
from roofline.tokenizer import Tokenizer

Bits = NDArray[np.uint64]  # [mask_bytes / 8]: bit i % 8 of their byte i // 8 is token i's


class Vocabulary:
    """A model's tokens, as llguidance has them and as masks over them."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int], size: int) -> None:
        self.size, self.mask_bytes = size, mask_bytes(size)
        special_ids = sorted({*tokenizer.special_ids, *eos_ids})
        self.ends = self.bits(eos_ids)
        self.text = self.bits(range(size)) & ~self.bits(special_ids)
        # A model that names no end is given one beyond its vocabulary, which no mask keeps.
        ends = list(eos_ids) or [size]
        whole_words = max(8 * self.mask_bytes, ends[0] + 1)
        tokens = _TokenBytes(tokenizer, whole_words, special_ids, ends[0])
        self.tokens = LLTokenizer(TokenizerWrapper(tokens), eos_token=ends)

    def bits(self, ids: Iterable[int]) -> Bits:
        """A mask of these tokens."""
        bits = np.zeros(self.mask_bytes * 8, dtype=np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint64)


class Grammar:
    """A compiled grammar; immutable, so that all who ask for it may share it."""

    def __init__(self, source: str, vocabulary: Vocabulary) -> None:
        self.source_bytes = len(source.encode())
        self.start = compiled(source, vocabulary.tokens)  # is only ever copied
        self.first = _next(self.start, len(vocabulary.text))  # what a text may begin with
        self.may_be_empty = self.start.is_accepting()
        self._vocabulary = vocabulary

    def matcher(self, params: SamplingParams) -> "GrammarMatcher":
        """Follow one answer; RequestError if its other parameters leave it no first token."""
        known = self._vocabulary
        params.check(known.size)
        among = ~np.zeros_like(known.text)
        if params.allowed_token_ids is not None:
            among = known.bits(params.allowed_token_ids)
        ends = known.ends & among
        return GrammarMatcher(self, known.text & among, ends, may_end=not params.ignore_eos)


class GrammarMatcher:
    """A TokenMatcher: one answer's place in a grammar.

    Of the tokens the grammar takes, `text` are allowed, and `ends` where the text may end; where it
    could also go on, only if `may_end`.
    """

    def __init__(self, grammar: Grammar, text: Bits, ends: Bits, *, may_end: bool) -> None:
        self._grammar, self._text, self._ends, self._may_end = grammar, text, ends, may_end
        self._matcher: LLMatcher | None = None  # a copy of the grammar's, from the first token on
        first = text & grammar.first
        if grammar.may_be_empty and (may_end or not first.any()):
            first |= ends
        self._mask = _checked(first)

    def mask(self) -> bytes:
        """What may come next."""
        return self._mask

    def accept(self, token: int) -> bool:
        """Take the next token; True when the text is complete and nothing may follow."""
        if self._matcher is None:
            self._matcher = self._grammar.start.deep_copy()
        matcher = self._matcher
        matcher.consume_token(token)
        if matcher.is_stopped() and not matcher.is_error():
            return True
        following = self._text & _next(matcher, len(self._text))
        if matcher.is_accepting():
            if not following.any():
                return True
            if self._may_end:
                following |= self._ends
        self._mask = _checked(following)
        return False


class _TokenBytes:
    """A vocabulary in the shape that TokenizerWrapper reads: the names are llguidance's.

    Rows of the embedding beyond the tokenizer's vocabulary have no bytes, so no grammar takes them.
    """

    bos_token_id: int | None = None

    def __init__(
        self, tokenizer: Tokenizer, size: int, special_ids: Sequence[int], eos_id: int
    ) -> None:
        known = tokenizer.vocab_size
        self.tokens = [tokenizer.token_bytes(token) for token in range(known)]
        self.tokens += [b""] * (size - known)
        self.special_token_ids, self.eos_token_id = special_ids, eos_id

    def __call__(self, text: bytes) -> list[int]:
        """Token ids of a text; grammars that force no tokens never ask."""
        raise NotImplementedError


def _next(matcher: LLMatcher, words: int) -> Bits:
    """What may come next in as many words; RequestError when the matcher gives up."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint64, count=words)
    if matcher.is_error():
        raise RequestError(f"the structured output cannot go on: {failure_of(matcher)}")
    return bits


def _checked(bits: Bits) -> bytes:
    if not bits.any():
        raise RequestError(
            "allowed_token_ids leaves no token with which the structured output could go on"
        )
    return bits.tobytes()
