"""Tests of each rule: cuts read off the patterns by hand, and ids by the original rules."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roofline.errors import UnsupportedError
from roofline.tokenizer.pretokenizers import pre_tokenizer_rule
from roofline.tokenizer.tokenizer import Tokenizer
from roofline.tokenizer.vocabulary import byte_level_bytes
from tests.byte_level_model import (
    MERGES,
    SPECIALS,
    STEPS,
    TABLE,
    TOKENS,
    Steps,
    gguf_metadata,
    split_then_bytes,
    write_tokenizer_json,
)
from tests.original_rules import GPT2, LLAMA3, QWEN2, RULES, TEKKEN, by_pair

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


ALIASES = {
    "deepseek-r1-qwen": "qwen2",
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "pixtral": "tekken",
    "smaug-bpe": "llama-bpe",
}
ADD_BOS = {"deepseek-r1-qwen", "llama-bpe", "llama-v3", "llama3", "pixtral", "tekken"}


@cache
def from_gguf(pre: str) -> Tokenizer:
    return Tokenizer.from_gguf(gguf_metadata(pre), "model.gguf")


def from_folder(folder: Path, steps: Steps) -> Tokenizer:
    return Tokenizer.from_folder(write_tokenizer_json(folder, steps))


def wrong(tokenizer: Tokenizer, rule: str) -> list[str]:
    """The hard strings whose ids are not the original rule's."""
    return [
        entry["text"]
        for entry in TABLE
        if tokenizer.encode(entry["text"], add_special_tokens=False) != entry["ids"][rule]
    ]


@pytest.mark.parametrize("pre", [*RULES, *ALIASES])
def test_hard_strings_in_a_gguf_have_the_ids_of_the_original_rule(pre: str) -> None:
    assert wrong(from_gguf(pre), ALIASES.get(pre, pre)) == []


@pytest.mark.parametrize("rule", STEPS)
def test_hard_strings_in_a_folder_have_the_ids_of_the_original_rule(
    tmp_path: Path, rule: str
) -> None:
    assert wrong(from_folder(tmp_path, STEPS[rule]), rule) == []


NEAR_MISSES = {
    "llama-bpe: digits one at a time": ("llama-bpe", LLAMA3, "{1,3}", ""),
    "llama-bpe: digits all together": ("llama-bpe", LLAMA3, "{1,3}", "+"),
    "llama-bpe: contractions in small letters": ("llama-bpe", LLAMA3, "(?i:", "(?:"),
    "llama-bpe: letters stand alone": ("llama-bpe", LLAMA3, r"[^\r\n\p{L}\p{N}]?\p{L}", r"\p{L}"),
    "llama-bpe: line ends leave what is before them": ("llama-bpe", LLAMA3, r"+[\r\n]*", "+"),
    "llama-bpe: line ends part white space": ("llama-bpe", LLAMA3, r"|\s*[\r\n]+", ""),
    "llama-bpe: white space keeps its last": ("llama-bpe", LLAMA3, r"|\s+(?!\S)", ""),
    "qwen2: digits three at a time": ("qwen2", QWEN2, r"\p{N}|", r"\p{N}{1,3}|"),
    "qwen2: digits are ASCII": ("qwen2", QWEN2, r"\p{N}| ", r"[0-9]| "),
    "qwen2: contractions in small letters": ("qwen2", QWEN2, "(?i:", "(?:"),
    "tekken: no slash after signs": ("tekken", TEKKEN, r"[\r\n/]*", r"[\r\n]*"),
    "tekken: marks are no letters": ("tekken", TEKKEN, r"\p{M}", ""),
    "tekken: title case is small": ("tekken", TEKKEN, r"\p{Lt}", ""),
    "tekken: modifiers are small": ("tekken", TEKKEN, r"\p{Lt}\p{Lm}", r"\p{Lt}"),
    "tekken: digits three at a time": ("tekken", TEKKEN, r"\p{N}|", r"\p{N}{1,3}|"),
    "tekken: contractions are words": ("tekken", TEKKEN, TEKKEN, f"(?i:'s|'t|'ll)|{TEKKEN}"),
    "gpt-2: contractions in capitals": ("gpt-2", GPT2, "'s|'t|'re|'ve|'m|'ll|'d", "(?i:'s|'t|'ll)"),
    "gpt-2: digits one at a time": ("gpt-2", GPT2, r"\p{N}+", r"\p{N}"),
}  # fmt: skip


@pytest.mark.parametrize("miss", NEAR_MISSES)
def test_the_table_tells_a_rule_from_its_near_misses(tmp_path: Path, miss: str) -> None:
    rule, pattern, old, new = NEAR_MISSES[miss]
    assert old in pattern
    for spelt, told in ((pattern, False), (pattern.replace(old, new), True)):
        steps = STEPS[rule]._replace(cuts=split_then_bytes(spelt))
        assert bool(wrong(from_folder(tmp_path, steps), rule)) == told


@pytest.mark.parametrize("rule", STEPS)
def test_the_table_tells_how_a_rule_merges_and_normalizes(tmp_path: Path, rule: str) -> None:
    steps = STEPS[rule]
    normalizer = None if steps.normalizer else {"type": "NFC"}
    assert wrong(from_folder(tmp_path, steps._replace(normalizer=normalizer)), rule)
    ignore_merges = not steps.ignore_merges
    assert wrong(from_folder(tmp_path, steps._replace(ignore_merges=ignore_merges)), rule)


def test_the_table_tells_every_rule_from_every_other() -> None:
    for rule in RULES:
        assert [other for other in RULES if not wrong(from_gguf(other), rule)] == [rule]


HARD_TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            ["'s", "'LL", "\r\n", "  ", "e\u0301", "ǅ", "ʰ", "½", "\u00a0", "😀", "各"]
        ),
        st.characters(codec="ascii"),
    ),
    max_size=12,
).map("".join)


IDS = {byte_level_bytes(token): id for id, token in enumerate(TOKENS) if token not in SPECIALS}
RANK = by_pair(
    [
        (byte_level_bytes(left), byte_level_bytes(right))
        for left, right in (merge.split(" ") for merge in MERGES)
    ]
)


@given(text=HARD_TEXT, rule=st.sampled_from(sorted(RULES)))
def test_any_text_has_the_ids_of_the_original_rule(text: str, rule: str) -> None:
    pieces = RULES[rule].pieces(text, IDS, RANK)
    assert from_gguf(rule).encode(text, add_special_tokens=False) == [IDS[p] for p in pieces]


@pytest.mark.parametrize("pre", [*RULES, *ALIASES])
def test_a_bos_is_added_where_the_models_own_tokenizer_adds_one(pre: str) -> None:
    assert from_gguf(pre).adds_bos == (pre in ADD_BOS)


def test_qwen2_composes_characters_and_the_others_leave_them() -> None:
    rule = pre_tokenizer_rule("qwen2", "model.gguf")
    assert rule.normalizer is not None
    assert rule.normalizer().normalize_str("e\u0301") == "\u00e9"
    for name in ("gpt-2", "default", "smollm", "llama-bpe", "tekken"):
        assert pre_tokenizer_rule(name, "model.gguf").normalizer is None


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnsupportedError, match=r"model\.gguf.*'falcon'.*llama-bpe.*qwen2.*tekken"):
        pre_tokenizer_rule("falcon", "model.gguf")
