"""How text is cut into words before byte-pair merges, by the name GGUF files give it.

The rules are those of the models' original tokenizers: docs/tokenizers.md says how they were held
against them. No vocabulary here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tokenizers import Regex, normalizers, pre_tokenizers

from roofline.errors import UnsupportedError


@dataclass(frozen=True)
class PreTokenizerRule:
    """What a pre-tokenizer's name stands for in a GGUF file."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False  # a word that is in the vocabulary whole is not merged together
    adds_bos: bool = False  # where the file does not say


def pre_tokenizer_rule(name: str, source: str) -> PreTokenizerRule:
    """Look a name of `tokenizer.ggml.pre` up; UnsupportedError for one that is not in the table."""
    rule = _RULES.get(name)
    if rule is None:
        raise UnsupportedError(
            f"{source}: tokenizer.ggml.pre '{name}' is not supported; "
            f"supported: {', '.join(sorted(_RULES))}"
        )
    return rule


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt2()])


def _cl100k(digits: str) -> pre_tokenizers.PreTokenizer:
    """As OpenAI's cl100k cuts, with runs of `digits`."""
    return _cut(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    )


def _tekken() -> pre_tokenizers.PreTokenizer:
    """Words end before a capital that follows a small letter; a contraction is no word."""
    capitals, small = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return _cut(
        r"[^\r\n\p{L}\p{N}]?" + f"{capitals}*{small}+",
        r"[^\r\n\p{L}\p{N}]?" + f"{capitals}+{small}*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    )


def _cut(*words: str) -> pre_tokenizers.PreTokenizer:
    """Cut out what the first of these patterns matches; of white space, keep lines together."""
    return _cut_by_each("|".join([*words, r"\s*[\r\n]+|\s+(?!\S)|\s+"]))


def _default() -> pre_tokenizers.PreTokenizer:
    """As llama.cpp cuts where the file's converter knew no rule."""
    return _cut_by_each(
        r"[\p{P}$+<=>^~|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )


def _cut_by_each(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cut out the matches of each pattern, and of the next one inside of what that leaves."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, to_bytes])


_LLAMA3_RULE = PreTokenizerRule(lambda: _cl100k(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True)
_QWEN2_RULE = PreTokenizerRule(lambda: _cl100k(r"\p{N}"), normalizers.NFC)
_TEKKEN_RULE = PreTokenizerRule(_tekken, ignore_merges=True, adds_bos=True)
_RULES = {
    "deepseek-r1-qwen": replace(_QWEN2_RULE, adds_bos=True),
    "default": PreTokenizerRule(_default),
    "gpt-2": PreTokenizerRule(_gpt2),
    "llama-bpe": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "pixtral": _TEKKEN_RULE,
    "qwen2": _QWEN2_RULE,
    "smaug-bpe": replace(_LLAMA3_RULE, adds_bos=False),  # Llama 3.x whose tokenizer.json adds none
    "smollm": PreTokenizerRule(_smollm),
    "tekken": _TEKKEN_RULE,
}
