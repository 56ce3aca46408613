"""Tests of each rule: cuts read off the patterns by hand, and ids by the original rules.

The vocabulary of those ids is small and cuts nowhere by itself: a rule that does shows in the ids.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roofline.errors import UnsupportedError
from roofline.tokenizer.pretokenizers import pre_tokenizer_rule
from roofline.tokenizer.tokenizer import Tokenizer
from roofline.tokenizer.vocabulary import byte_level_bytes
from tests.original_rules import GPT2, LLAMA3, QWEN2, RULES, TEKKEN, by_pair

DATA = Path(__file__).parents[2] / "tests" / "data"
VOCABULARY: dict[str, Any] = json.loads((DATA / "byte_level_vocabulary.json").read_text())
TABLE: list[dict[str, Any]] = json.loads((DATA / "byte_level_ids.json").read_text())["strings"]

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


TOKENS: list[str] = VOCABULARY["tokens"]
MERGES: list[str] = VOCABULARY["merges"]
SPECIALS: list[str] = VOCABULARY["specials"]
BYTES_OF = {token: byte_level_bytes(token) for token in TOKENS}
RANK = by_pair(
    [(BYTES_OF[left], BYTES_OF[right]) for left, right in (merge.split(" ") for merge in MERGES)]
)
ALIASES = {
    "deepseek-r1-qwen": "qwen2",
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "pixtral": "tekken",
    "smaug-bpe": "llama-bpe",
}
ADD_BOS = {"deepseek-r1-qwen", "llama-bpe", "llama-v3", "llama3", "pixtral", "tekken"}


def split_then_bytes(pattern: str) -> list[dict[str, Any]]:
    """As tokenizer.json has it for models whose words a published pattern cuts."""
    regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**regex, "invert": False}, BYTES | {"use_regex": False}]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# What the tokenizer.json of a model of each kind holds; llama.cpp's default is in none.
WRITTEN: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None, bool]] = {
    "gpt-2": ([BYTES], None, False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, BYTES], None, False),
    "llama-bpe": (split_then_bytes(LLAMA3), None, True),
    "qwen2": (split_then_bytes(QWEN2), {"type": "NFC"}, False),
    "tekken": (split_then_bytes(TEKKEN), None, True),
}


@cache
def from_gguf(pre: str) -> Tokenizer:
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": TOKENS,
        "merges": MERGES,
        "token_type": np.array([3 if token in SPECIALS else 1 for token in TOKENS], np.int32),
        "bos_token_id": TOKENS.index(SPECIALS[0]),
    }
    keys = {f"tokenizer.ggml.{name}": value for name, value in metadata.items()}
    return Tokenizer.from_gguf(keys, "model.gguf")


def from_folder(
    folder: Path,
    cuts: list[dict[str, Any]],
    normalizer: dict[str, Any] | None,
    ignore_merges: bool,
) -> Tokenizer:
    model = {
        "type": "BPE",
        "vocab": {token: id for id, token in enumerate(TOKENS) if token not in SPECIALS},
        "merges": MERGES,
        "ignore_merges": ignore_merges,
    }
    added = {"special": True, "normalized": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    document = {
        "version": "1.0",
        "added_tokens": [
            {"id": TOKENS.index(token), "content": token, **added, **flags} for token in SPECIALS
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "decoder": BYTES,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return Tokenizer.from_folder(folder)


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


@pytest.mark.parametrize("rule", WRITTEN)
def test_hard_strings_in_a_folder_have_the_ids_of_the_original_rule(
    tmp_path: Path, rule: str
) -> None:
    assert wrong(from_folder(tmp_path, *WRITTEN[rule]), rule) == []


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
    _, normalizer, ignore_merges = WRITTEN[rule]
    assert old in pattern
    for spelt, told in ((pattern, False), (pattern.replace(old, new), True)):
        tokenizer = from_folder(tmp_path, split_then_bytes(spelt), normalizer, ignore_merges)
        assert bool(wrong(tokenizer, rule)) == told


@pytest.mark.parametrize("rule", WRITTEN)
def test_the_table_tells_how_a_rule_merges_and_normalizes(tmp_path: Path, rule: str) -> None:
    cuts, normalizer, ignore_merges = WRITTEN[rule]
    assert wrong(from_folder(tmp_path, cuts, normalizer, not ignore_merges), rule)
    other = None if normalizer else {"type": "NFC"}
    assert wrong(from_folder(tmp_path, cuts, other, ignore_merges), rule)


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


@given(text=HARD_TEXT, rule=st.sampled_from(sorted(RULES)))
def test_any_text_has_the_ids_of_the_original_rule(text: str, rule: str) -> None:
    ids = {BYTES_OF[token]: id for id, token in enumerate(TOKENS) if token not in SPECIALS}
    pieces = RULES[rule].pieces(text, ids, RANK)
    assert from_gguf(rule).encode(text, add_special_tokens=False) == [ids[p] for p in pieces]


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
