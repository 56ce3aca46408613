"""From what a request wants its text to be like to the matchers that see to it.

A grammar is tried in a child process first (`trial.py`), then compiled over the model's vocabulary
(`matching.py`) and kept for the next who asks for it. The library is loaded with the first.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence

from roofline import grammars
from roofline.errors import RequestError
from roofline.request import SamplingParams
from roofline.sandbox import Sandbox
from roofline.structured_outputs import StructuredOutputsParams, TokenMatcher
from roofline.tokenizer import Tokenizer

_TRIAL = "roofline.grammars.trial"
_TRIAL_S = 1.0
_TRIAL_BYTES = 256 << 20
_CACHED_GRAMMARS = 256  # of some 60 KB each
_CACHED_SOURCE_BYTES = 512 << 10  # a large one takes up to 90 times its source


class GrammarCompiler:
    """Compiles for one model; safe between threads. What it holds in memory is bounded."""

    def __init__(
        self, tokenizer: Tokenizer | None, eos_ids: Sequence[int], vocab_size: int
    ) -> None:
        self._tokenizer, self._eos_ids, self._vocab_size = tokenizer, eos_ids, vocab_size
        self._vocabulary: grammars.matching.Vocabulary | None = None
        self._sandbox = Sandbox(memory_bytes=_TRIAL_BYTES)
        self._lock = threading.Lock()
        self._cache: OrderedDict[StructuredOutputsParams, grammars.matching.Grammar] = OrderedDict()
        self._cached_bytes = 0

    def matchers(self, params: SamplingParams) -> Sequence[TokenMatcher | None]:
        """One for each of the n answers, None where any text will do.

        RequestError for a grammar that nobody can follow.
        """
        if params.structured_outputs is None:
            return [None] * params.n
        try:
            grammar = self._grammar(params.structured_outputs)
            return [grammar.matcher(params) for _ in range(params.n)]
        except RequestError as error:
            raise RequestError(error.message, param="structured_outputs") from error

    def close(self) -> None:
        """End the child process."""
        self._sandbox.close()

    def _grammar(self, asked: StructuredOutputsParams) -> "grammars.matching.Grammar":
        """A compiled grammar, of those kept the latest to be asked for."""
        with self._lock:
            grammar = self._cache.get(asked)
            if grammar is not None:
                self._cache.move_to_end(asked)
                return grammar
        # Not under the lock: nobody whose grammar is known waits for one that takes long.
        grammar = grammars.matching.Grammar(self._tried(asked), self._known_tokens())
        with self._lock:
            self._keep(asked, grammar)
        return grammar

    def _keep(self, asked: StructuredOutputsParams, grammar: "grammars.matching.Grammar") -> None:
        if asked in self._cache:  # another thread was faster
            return
        self._cache[asked] = grammar
        self._cached_bytes += grammar.source_bytes
        while len(self._cache) > _CACHED_GRAMMARS or self._cached_bytes > _CACHED_SOURCE_BYTES:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.source_bytes

    def _known_tokens(self) -> "grammars.matching.Vocabulary":
        if self._tokenizer is None:
            raise RequestError("structured_outputs need a tokenizer, and this model has none")
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = grammars.matching.Vocabulary(
                    self._tokenizer, self._eos_ids, self._vocab_size
                )
            return self._vocabulary

    def _tried(self, asked: StructuredOutputsParams) -> str:
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


def _question(asked: StructuredOutputsParams) -> tuple[str, str | Sequence[str], str | None]:
    """The kind of a grammar, its source, and a regex for what may be between parts of JSON."""
    whitespace = "" if asked.disable_any_whitespace else asked.whitespace_pattern
    if asked.json_object:
        return "json_object", '{"type":"object"}', whitespace
    for kind, source in (("json", asked.json), ("choice", asked.choice), ("regex", asked.regex)):
        if isinstance(source, (str, tuple)):
            return kind, source, whitespace
    assert asked.grammar is not None
    return "grammar", asked.grammar, None
