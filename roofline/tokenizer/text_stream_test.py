"""Tests of streamed text: whole characters, stop strings never in part, linear work."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from roofline.errors import RequestError
from roofline.models.checkpoints.gguf import GGUFFile
from roofline.tokenizer.text_stream import TextStream
from roofline.tokenizer.tokenizer import Tokenizer
from roofline.tokenizer.vocabulary_test import IM_END, SIZE, TOOL, small_metadata

SMALL = Tokenizer.from_gguf(small_metadata(), "small.gguf")  # ids 0-255 are the bytes
BROKEN = "\ufffd"
# How decode shows an unfinished character. Two are ED with A0-BF, the start of a surrogate, which
# CPython's decoder waits with though nothing can finish it.
UNFINISHED = ("", BROKEN, BROKEN * 2)


def pushed(stream: TextStream, ids: Sequence[int], sizes: Sequence[int] = (1,)) -> list[str]:
    """What each push shows, with pushes of these sizes in turn."""
    turns, rest, shown = itertools.cycle(sizes), list(ids), list[str]()
    while rest:
        size = next(turns)
        shown.append(stream.push(rest[:size]))
        del rest[:size]
    return shown


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str | None]:
    """By brute force: where the first stop string to be completed begins, and which it is."""
    for end in range(1, len(text) + 1):
        completed = [stop for stop in stops if text[:end].endswith(stop)]
        if completed:
            stop = max(completed, key=len)
            return end - len(stop), stop
    return len(text), None


def test_half_a_character_waits_for_its_other_half() -> None:
    assert pushed(TextStream(SMALL), list("a😀é".encode())) == [*("a", "", "", "", "😀", "", "é")]


def test_an_unfinished_character_at_the_end_is_dropped() -> None:
    stream = TextStream(SMALL)
    assert pushed(stream, list("ok😀".encode()[:-1])) == ["o", "k", "", "", ""]
    assert stream.finish() == ""
    assert stream.text == "ok"


def test_a_replacement_character_that_is_a_token_is_shown_at_once() -> None:
    stream = TextStream(SMALL)
    assert pushed(stream, list("a\ufffd".encode()), [4]) == ["a\ufffd"]


def test_bytes_that_are_no_character_are_shown_as_decode_shows_them() -> None:
    ids = [0xF0, 0x9F, ord("a"), 0xFF, 0x80, 0xC3, 0xA9]
    stream = TextStream(SMALL)
    assert "".join(pushed(stream, ids)) == SMALL.decode(ids) == f"{BROKEN}a{BROKEN}{BROKEN}é"


def test_special_tokens_are_shown_on_request_only() -> None:
    ids = [ord("a"), IM_END, TOOL, ord("b")]
    assert "".join(pushed(TextStream(SMALL), ids)) == "a<tool>b"
    shown = pushed(TextStream(SMALL, skip_special_tokens=False), ids)
    assert shown == ["a", "<|im_end|>", "<tool>", "b"]


def test_a_stop_string_over_many_tokens_is_never_shown() -> None:
    stream = TextStream(SMALL, stop=["STOP"])
    assert pushed(stream, list(b"go STOP on")) == [*"go ", "", "", "", "", "", "", ""]
    assert (stream.text, stream.stopped_by, stream.finish()) == ("go ", "STOP", "")


def test_what_looked_like_a_stop_string_is_shown_once_it_is_none() -> None:
    stream = TextStream(SMALL, stop=["STOP"])
    assert pushed(stream, list(b"STOUTS")) == ["", "", "", "STOU", "T", ""]
    assert stream.finish() == "S"
    assert (stream.text, stream.stopped_by) == ("STOUTS", None)


def test_a_stop_string_may_begin_inside_a_failed_one() -> None:
    stream = TextStream(SMALL, stop=["aab"])
    assert pushed(stream, list(b"aaab")) == ["", "", "a", ""]
    assert stream.stopped_by == "aab"


def test_a_stop_string_may_be_shown_on_request() -> None:
    stream = TextStream(SMALL, stop=["ST"], include_stop_str_in_output=True)
    assert pushed(stream, list(b"a ST b"), [6]) == ["a ST"]
    assert (stream.stopped_by, stream.finish(), stream.text) == ("ST", "", "a ST")


def test_one_stop_string_needs_no_list() -> None:
    stream = TextStream(SMALL, stop="end")
    assert "".join(pushed(stream, list(b"the end"))) == "the "


def test_text_that_may_not_stop_is_no_part_of_a_stop_string() -> None:
    stream = TextStream(SMALL, stop=["ab"])
    assert stream.push(b"ab a", may_stop=False) == "ab a"
    assert stream.push(b"b ab") == "b "
    assert stream.stopped_by == "ab"


@pytest.mark.parametrize(
    ("text", "stops", "shown", "stopped_by"),
    [
        ("xyab", ["ab", "y"], "x", "y"),  # the earlier in the text, not in the list
        ("xabcd", ["abc", "ab"], "x", "ab"),  # at the same start the shorter: it is completed first
        ("xabc", ["bc", "abc"], "x", "abc"),  # completed together: the one that starts earlier
        ("xabcd", ["abcd", "bc"], "xa", "bc"),  # completed before the other could be
    ],
)
@pytest.mark.parametrize("size", [1, 2, 9])
def test_the_stop_string_completed_first_wins_however_the_text_is_cut(
    text: str, stops: list[str], shown: str, stopped_by: str, size: int
) -> None:
    stream = TextStream(SMALL, stop=stops)
    assert "".join(pushed(stream, list(text.encode()), [size])) + stream.finish() == shown
    assert stream.stopped_by == stopped_by


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [None], [b"a"]])
def test_what_is_no_stop_string_is_refused(stop: Any) -> None:
    with pytest.raises(RequestError, match="stop string"):
        TextStream(SMALL, stop=stop)


def test_a_padding_row_of_the_embedding_has_no_text() -> None:
    assert TextStream(SMALL).push([SIZE, SIZE + 5]) == ""


IDS = st.lists(st.one_of(st.integers(0, SIZE - 1), st.integers(0x80, 0xFF)), max_size=40)
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@given(IDS, SIZES)
@example([0xE2, 0x82, 0xE2, 0x82, 0xAC], [1])
def test_pushes_joined_are_the_decoded_text_but_for_an_unfinished_character(
    ids: list[int], sizes: list[int]
) -> None:
    stream = TextStream(SMALL)
    text = "".join(pushed(stream, ids, sizes)) + stream.finish()
    assert SMALL.decode(ids) in [text + tail for tail in UNFINISHED]
    assert stream.text == text


@given(
    st.text("ab", max_size=40),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    SIZES,
    st.booleans(),
)
def test_stop_strings_agree_with_brute_force_after_every_push(
    text: str, stops: list[str], sizes: list[int], included: bool
) -> None:
    start, stopped_by = first_stop(text, stops)
    expected = text[:start] + (stopped_by or "" if included else "")
    stream = TextStream(SMALL, stop=stops, include_stop_str_in_output=included)
    shown = ""
    for piece in pushed(stream, list(text.encode()), sizes):
        shown += piece
        assert expected.startswith(shown)  # nothing leaks that would have to be taken back
    assert shown + stream.finish() == expected
    assert stream.stopped_by == stopped_by


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    stream = TextStream(SMALL, stop=stops)
    for end, character in enumerate(text.encode(), 1):
        stream.push([character])
        if stream.stopped_by is None:
            held = text[len(stream.text) : end]
            assert not held or any(stop.startswith(held) for stop in stops)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    with GGUFFile(smollm2_path) as file:
        return Tokenizer.from_gguf(file.metadata, smollm2_path.name)


@given(data=st.data())
def test_random_ids_of_the_real_vocabulary_stream_as_they_decode(
    smollm2: Tokenizer, data: st.DataObject
) -> None:
    halves = [218, 242, 10813, 173, 24211]  # of emoji and others, U+FFFD itself
    one = st.one_of(st.integers(0, smollm2.vocab_size - 1), st.sampled_from(halves))
    ids = data.draw(st.lists(one, max_size=30))
    stream = TextStream(smollm2)
    text = "".join(pushed(stream, ids, data.draw(SIZES))) + stream.finish()
    assert smollm2.decode(ids) in [text + tail for tail in UNFINISHED]


@given(text=st.text("日本語😀👍🏽é \n1a", max_size=30), sizes=SIZES)
def test_text_of_split_characters_streams_without_a_broken_one(
    smollm2: Tokenizer, text: str, sizes: list[int]
) -> None:
    stream = TextStream(smollm2, stop=["STOP"])
    shown = pushed(stream, smollm2.encode(text), sizes)
    assert "".join(shown) + stream.finish() == text
    assert not any(BROKEN in piece for piece in shown)


def test_the_work_is_linear_even_in_text_that_is_nearly_a_stop_string() -> None:
    def seconds(n: int) -> float:
        stream = TextStream(SMALL, stop=["a" * 500 + "b"])
        start = time.thread_time()
        for _ in range(n):
            stream.push([ord("a")])
        return time.thread_time() - start

    seconds(1_000)
    assert seconds(40_000) < 4 * 2.5 * max(seconds(10_000), 1e-3)
