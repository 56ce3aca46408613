"""What is refused of a tokenizer.json's steps, and that no model's own are."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from roofline.tokenizer.text_steps import runaway_step
from tests.original_rules import GPT2, LLAMA3, LLAMA_CPP_DEFAULT, QWEN2, TEKKEN

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
# ruff: noqa: RUF001 (letters that look like others)
PATTERNS_OF_MODELS = [
    *(GPT2, LLAMA3, QWEN2, TEKKEN, *LLAMA_CPP_DEFAULT),
    # of other models that are built like Llama
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[一-龥ࠀ-一가-퟿]+|\s+$|[\r\n]",
]
RUNAWAY = [
    *("(a+)+b", "(?:a|a)*b", "(a|aa)+", "(a+){2,}b", "((a+))+", "(?i:a+)*", "(?=a)*", "(a+)*?"),
    *("a**", "a+{2,}", "a{1,9}{1,9}", "a{1,9}+", "(?<r>a+)\\g<r>*", "(a+)\\1", "(?<r>a)\\k<r>"),
    *("(?x)( a+ ) +", "(?#[)(a+)+b(?#])", "(?x:(a+)#\n+)", "[a]]{2}", "(?~a)", "(?{x})"),
]


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}


@pytest.mark.parametrize("pattern", PATTERNS_OF_MODELS)
def test_patterns_of_models_are_taken(pattern: str) -> None:
    steps = {"type": "Sequence", "pretokenizers": [split(pattern), BYTES]}
    assert runaway_step(None, steps) is None


@pytest.mark.parametrize("pattern", RUNAWAY)
def test_a_pattern_that_repeats_a_group_is_refused(pattern: str) -> None:
    steps = {"type": "Sequence", "pretokenizers": [split(r"\p{N}"), split(pattern), BYTES]}
    fault = runaway_step(None, steps)
    assert fault is not None
    assert fault.startswith("pattern '")
    assert fault.endswith("is not supported; supported: those that repeat no group")


@pytest.mark.parametrize(
    ("normalizer", "fault"),
    [
        (None, None),
        ({"type": "NFC"}, None),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, None),
        ({"type": "Prepend", "prepend": "▁"}, None),
        ({"type": "Prepend", "prepend": "▁" * 17}, "Prepend is longer than 16"),
        ({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}, "makes no text longer"),
        ({"type": "Replace", "pattern": {"Regex": "a"}, "content": "a"}, "of a String"),
        ({"type": "Replace"}, "of a String"),
        ({"type": "ByteLevel"}, "normalizer 'ByteLevel' is not supported; supported: Lowercase, "),
        ({"type": "Precompiled"}, "normalizer 'Precompiled' is not supported"),
        ({"type": 3}, "normalizer 3 is not supported"),
    ],
)
def test_a_normalizer_that_lengthens_text_is_refused_wherever_it_stands(
    normalizer: dict[str, Any] | None, fault: str | None
) -> None:
    nested: Any = normalizer
    for _ in range(10_000):  # deeper than Python's stack
        nested = {"type": "Sequence", "normalizers": [nested]}
    for value in (normalizer, nested):
        found = runaway_step(value, None)
        assert found is None if fault is None else found is not None and fault in found


def test_bytes_of_bytes_are_refused() -> None:
    assert runaway_step(None, {"type": "Sequence", "pretokenizers": [BYTES, BYTES]}) is not None


@given(st.text("()[]{}\\|*+?^$,ap1:=!<>-&#x ", max_size=12), st.text("ap1 -", max_size=20))
def test_no_short_pattern_that_is_taken_takes_long(pattern: str, text: str) -> None:
    if runaway_step(None, split(pattern)) is None:
        try:
            cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        except Exception:  # its own; it has none of a narrower class
            return
        start = time.thread_time()
        words = cut.pre_tokenize_str(text)
        assert time.thread_time() - start < 0.5
        assert "".join(word for word, _ in words) == text


@pytest.mark.parametrize(
    "pattern",
    ["(" * 10**6, "[" * 10**6, "[[a]" * 10**5, "a" * 10**6 + "\\", "\\p{" * 10**5],
    ids=range(5),
)
def test_a_huge_pattern_is_read_in_no_time(pattern: str) -> None:
    start = time.thread_time()
    runaway_step(None, split(pattern))
    assert time.thread_time() - start < 1


def test_the_library_does_take_long_for_what_is_refused() -> None:
    """Why all this is here: should it one day be quick, this file can go."""
    cut = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    with pytest.raises(BaseException, match="retry-limit-in-match over"):
        cut.pre_tokenize_str("a" * 30)
