"""How text is cut into words before byte-pair merges, by the name GGUF files give it.

The rules are those of the models' original tokenizer.json. No vocabulary here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from roofline.errors import UnsupportedError


@dataclass(frozen=True)
class PreTokenizerRule:
    """What else a pre-tokenizer's name stands for in a GGUF file."""

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


def _tiktoken(digits: str) -> pre_tokenizers.PreTokenizer:
    """Split as OpenAI's cl100k does, with runs of `digits`."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, to_bytes])


_GPT2_RULE = PreTokenizerRule(_gpt2)
_LLAMA3_RULE = PreTokenizerRule(lambda: _tiktoken(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True)
_RULES = {
    "default": _GPT2_RULE,
    "gpt-2": _GPT2_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "qwen2": PreTokenizerRule(lambda: _tiktoken(r"\p{N}"), normalizers.NFC),
    "smollm": PreTokenizerRule(_smollm),
}
