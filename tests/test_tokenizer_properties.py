"""What holds of every kind of tokenizer, in every file it comes in, for any text and any ids."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roofline.tokenizer import TextStream, Tokenizer
from tests import byte_level_model, sentencepiece_model
from tests.hard_strings import HARD_STRINGS
from tests.original_rules import RULES

BROKEN = "\ufffd"
# How decode shows an unfinished character. Two are ED with A0-BF, the start of a surrogate, which
# CPython's decoder waits with though nothing can finish it.
UNFINISHED = ("", BROKEN, BROKEN * 2)
SENTENCEPIECE = {"gguf llama", "tokenizer.bin", "prepend", "metaspace"}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A tokenizer of a kind, from a file of its own."""
    source, _, rule = kind.partition(" ")
    with TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "gguf llama":
            return Tokenizer.from_gguf(sentencepiece_model.gguf_metadata(), "model.gguf")
        if kind == "tokenizer.bin":
            path = sentencepiece_model.write_tokenizer_bin(folder / "tokenizer.bin")
            return Tokenizer.from_llama2c(path)
        if kind == "prepend" or kind == "metaspace":
            return Tokenizer.from_folder(sentencepiece_model.write_tokenizer_json(folder, kind))
        if source == "gguf":
            return Tokenizer.from_gguf(byte_level_model.gguf_metadata(rule), "model.gguf")
        steps = byte_level_model.STEPS[rule]
        return Tokenizer.from_folder(byte_level_model.write_tokenizer_json(folder, steps))


KINDS = [
    *(f"gguf {rule}" for rule in RULES),
    *(f"folder {rule}" for rule in byte_level_model.STEPS),
    *sorted(SENTENCEPIECE),
]
every_kind = pytest.mark.parametrize("kind", KINDS)
in_short = settings(max_examples=30)  # of each kind

TEXTS = st.lists(
    st.one_of(st.sampled_from(HARD_STRINGS), st.text(max_size=6)), max_size=5
).map("".join)  # fmt: skip
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def comes_back(kind: str, text: str) -> str:
    """What a kind keeps of a text: all, but for what its model was trained without."""
    if kind in SENTENCEPIECE:
        text = text.replace("\u2581", " ")  # how it writes a space
        return (
            text.removeprefix(" ") if kind == "metaspace" else text
        )  # takes the first for its own
    return normalize("NFC", text) if kind.endswith("qwen2") else text


def pushed(stream: TextStream, ids: Sequence[int], sizes: Sequence[int]) -> str:
    """All that a stream shows of ids, in batches of these sizes in turn."""
    shown, start = "", 0
    while start < len(ids):
        size = sizes[start % len(sizes)]
        shown += stream.push(ids[start : start + size])
        start += size
    assert stream.text == shown
    return shown + stream.finish()


@cache
def any_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Random ids, many of them parts of characters and special ones."""
    tokenizer = tokenizer_of(kind)
    parts = [id for id in range(tokenizer.vocab_size) if BROKEN in tokenizer.token_text(id)]
    some = [*parts, *tokenizer.special_ids]
    one = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from(some))
    return st.lists(one, max_size=24)


@every_kind
@pytest.mark.parametrize("parse_special", [True, False])
def test_hard_strings_come_back(kind: str, parse_special: bool) -> None:
    tokenizer = tokenizer_of(kind)
    for text in HARD_STRINGS:
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=parse_special)
        back = tokenizer.decode(ids, skip_special_tokens=False)
        if tokenizer.special_ids.isdisjoint(ids):  # else a Metaspace puts a space after the token
            assert back == comes_back(kind, text)


@every_kind
@in_short
@given(text=TEXTS, sizes=SIZES)
def test_any_text_comes_back_whole_and_streamed(kind: str, text: str, sizes: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.special_ids.isdisjoint(ids[tokenizer.adds_bos :])
    assert tokenizer.decode(ids) == comes_back(kind, text)
    stream = TextStream(tokenizer, stop=["\udbff never in a text"])
    assert pushed(stream, ids, sizes) == comes_back(kind, text)


@every_kind
@in_short
@given(data=st.data(), sizes=SIZES, skip=st.booleans())
def test_any_ids_stream_as_they_decode(
    kind: str, data: st.DataObject, sizes: list[int], skip: bool
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = data.draw(any_ids(kind))
    text = pushed(TextStream(tokenizer, skip_special_tokens=skip), ids, sizes)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert whole in [text + unfinished for unfinished in UNFINISHED]


@every_kind
@in_short
@given(data=st.data(), text=TEXTS, sizes=SIZES, skip=st.booleans())
def test_a_stream_after_text_goes_on_from_it(
    kind: str, data: st.DataObject, text: str, sizes: list[int], skip: bool
) -> None:
    tokenizer = tokenizer_of(kind)
    before = tokenizer.encode(text)
    ids = data.draw(any_ids(kind))
    stream = TextStream(tokenizer, after=before, skip_special_tokens=skip)
    start = tokenizer.decode(before, skip_special_tokens=skip)
    whole = tokenizer.decode([*before, *ids], skip_special_tokens=skip)
    shown = start + pushed(stream, ids, sizes)
    assert whole in [shown + unfinished for unfinished in UNFINISHED]


@every_kind
@in_short
@given(text=TEXTS, data=st.data(), sizes=SIZES, included=st.booleans())
def test_text_ends_at_the_first_stop_string_however_it_is_cut(
    kind: str, text: str, data: st.DataObject, sizes: list[int], included: bool
) -> None:
    tokenizer = tokenizer_of(kind)
    text = tokenizer.decode(tokenizer.encode(text))
    start = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stop = text[start : start + data.draw(st.integers(1, 5))] or "\udbff"
    stream = TextStream(tokenizer, stop=[stop], include_stop_str_in_output=included)
    shown = pushed(stream, tokenizer.encode(text, add_special_tokens=False), sizes)
    text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
    before, found, _ = text.partition(stop)
    assert shown == before + (found if included else "")
    assert stream.stopped_by == (found or None)
