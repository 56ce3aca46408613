"""The original rules of byte-level tokenizers, spelt out once more in plain Python.

What Roofline's ids are held against, with another regex engine: it owes nothing to `roofline` nor
to `tokenizers`. Beside each pattern stands where it was published.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import regex

Rank = Callable[[bytes, bytes], int | None]  # of two neighbours that may merge: the lower first

# openai/gpt-2, encoder.py
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# meta-llama/llama-models, models/llama3/tokenizer.py, Tokenizer.pat_str
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# QwenLM's dashscope, tokenizers/qwen_tokenizer.py, PAT_STR; transformers, Qwen2's tokenizer
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# mistralai/mistral-common, data/tekken_240718.json, config.pattern
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ggml-org/llama.cpp, llama-vocab.cpp, the default of llm_tokenizer_bpe
LLAMA_CPP_DEFAULT = (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class OriginalRule:
    """How one kind of model cuts text into words, and what of a word is one token."""

    cuts: tuple[str, ...]  # patterns, each applied inside of what those before it left and found
    composes: bool = False  # NFC first
    whole_words: bool = False  # a word that is in the vocabulary is that token, merges or not

    def words(self, text: str) -> list[str]:
        """Cut a text."""
        words = [unicodedata.normalize("NFC", text) if self.composes else text]
        for pattern in self.cuts:
            words = [part for word in words for part in _parts(pattern, word)]
        return words

    def pieces(self, text: str, vocabulary: Mapping[bytes, int], rank: Rank) -> list[bytes]:
        """Cut a text into tokens."""
        pieces = list[bytes]()
        for word in self.words(text):
            data = word.encode()
            pieces += [data] if self.whole_words and data in vocabulary else merged(data, rank)
        return pieces


RULES = {
    "default": OriginalRule(LLAMA_CPP_DEFAULT),
    "gpt-2": OriginalRule((GPT2,)),
    "llama-bpe": OriginalRule((LLAMA3,), whole_words=True),
    "qwen2": OriginalRule((QWEN2,), composes=True),
    "smollm": OriginalRule((r"\p{N}", GPT2)),  # SmolLM2's tokenizer.json: Digits, ByteLevel
    "tekken": OriginalRule((TEKKEN,), whole_words=True),
}


def merged(word: bytes, rank: Rank) -> list[bytes]:
    """Merge the pair of lowest rank, leftmost first, until none is left."""
    pieces = [bytes((byte,)) for byte in word]
    while True:
        ranked = [
            (found, place)
            for place, pair in enumerate(pairwise(pieces))
            if (found := rank(*pair)) is not None
        ]
        if not ranked:
            return pieces
        _, place = min(ranked)
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def by_token(vocabulary: Mapping[bytes, int]) -> Rank:
    """Merge what makes a token, tokens of lower ids first: tiktoken's rule."""
    return lambda left, right: vocabulary.get(left + right)


def by_pair(merges: Iterable[tuple[bytes, bytes]]) -> Rank:
    """Merge the pairs of a list, the first first: GPT-2's rule."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return lambda left, right: ranks.get((left, right))


def merges_of(vocabulary: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to make a token of two others, as converters write tiktoken's ranks as merges."""
    merges = list[tuple[bytes, bytes]]()
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def printable(data: bytes) -> str:
    """Bytes in GPT-2's alphabet: printable ones are themselves, the others lie from U+0100 on."""
    return "".join(ALPHABET[byte] for byte in data)


def bytes_of(text: str) -> bytes:
    """The bytes that `printable` wrote so."""
    return bytes(ALPHABET.index(character) for character in text)


def _alphabet() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


ALPHABET = _alphabet()


def _parts(pattern: str, word: str) -> list[str]:
    """The matches of a pattern and what lies between them, in order."""
    parts, end = list[str](), 0
    for match in regex.finditer(pattern, word):
        parts += [word[end : match.start()], match[0]]
        end = match.end()
    return [part for part in [*parts, word[end:]] if part]
