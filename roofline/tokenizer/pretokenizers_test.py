"""Tests of how each rule cuts words: the expected cuts are read off the patterns by hand."""

import pytest

from roofline.errors import UnsupportedError
from roofline.tokenizer.pretokenizers import pre_tokenizer_rule

# text, then its words under gpt-2, smollm, llama-bpe and qwen2, with Ġ for a space and Ċ for \n
CUTS = [
    # GPT-2 keeps digits together, SmolLM2 and Qwen2 part them all, Llama 3 takes three at a time.
    ("12345", "12345", "1 2 3 4 5", "123 45", "1 2 3 4 5"),
    # A space belongs to a following word; before digits only GPT-2 lets it.
    ("a 1", "a Ġ1", "a Ġ 1", "a Ġ 1", "a Ġ 1"),
    # Of two spaces the last goes with the word; SmolLM2 has cut the digit off, so both stay.
    ("a  1", "a Ġ Ġ1", "a ĠĠ 1", "a Ġ Ġ 1", "a Ġ Ġ 1"),
    # Contractions in capitals are contractions only to the patterns with (?i:...).
    ("I'LL", "I ' LL", "I ' LL", "I 'LL", "I 'LL"),
    # The later patterns give any one non-letter to the letters after it, and line ends to the rest.
    ("(x);\ny", "( x ); Ċ y", "( x ); Ċ y", "(x );Ċ y", "(x );Ċ y"),
    # Line ends stay together, and take white space before them along.
    ("a \n\nb", "a ĠĊ Ċ b", "a ĠĊ Ċ b", "a ĠĊĊ b", "a ĠĊĊ b"),
]


@pytest.mark.parametrize(
    ("rule", "column"), [("gpt-2", 1), ("smollm", 2), ("llama-bpe", 3), ("qwen2", 4)]
)
@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: repr(cuts[0]))
def test_words_are_cut_as_the_original_pattern_says(
    rule: str, column: int, cuts: tuple[str, ...]
) -> None:
    words = pre_tokenizer_rule(rule, "model.gguf").split().pre_tokenize_str(cuts[0])
    assert " ".join(word for word, _ in words) == cuts[column]


def test_qwen2_composes_characters_and_the_others_leave_them() -> None:
    rule = pre_tokenizer_rule("qwen2", "model.gguf")
    assert rule.normalizer is not None
    assert rule.normalizer().normalize_str("e\u0301") == "\u00e9"
    for name in ("gpt-2", "default", "smollm", "llama-bpe", "llama3"):
        assert pre_tokenizer_rule(name, "model.gguf").normalizer is None


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnsupportedError, match=r"model\.gguf.*'tekken'.*llama-bpe.*qwen2.*smollm"):
        pre_tokenizer_rule("tekken", "model.gguf")
