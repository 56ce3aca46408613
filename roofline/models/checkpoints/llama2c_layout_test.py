"""Headers alone: which layouts they can mean; whole files are in `llama2c_test`."""

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roofline.errors import CheckpointError, RooflineError
from roofline.models.checkpoints.llama2c_layout import KUIPER, LEGACY, identify

STORIES_15M = (288, 768, 6, 6, 6, 32000, 256)


def test_the_published_model_of_15m_parameters_has_its_size() -> None:
    header = struct.pack("<7i", *STORIES_15M) + struct.pack("<f", -0.055)  # and its first weight
    contents = identify(header, 60_816_028)  # stories15M.bin
    assert contents.layout is LEGACY
    assert contents.config.tie_word_embeddings
    assert sum(place.items for place in contents.places.values()) == 15_191_712


def test_size_alone_tells_a_file_of_floats_from_one_of_int8() -> None:
    header = struct.pack("<8i", *STORIES_15M, 64)
    assert identify(header, 60_816_028).layout is LEGACY
    weights, embedding, norms = 5_971_968, 32000 * 288, 13 * 288
    size = 32 + weights + 4 * (weights // 64 + embedding + norms)
    assert identify(header, size).layout is KUIPER


def test_a_file_that_both_layouts_fit_is_refused() -> None:
    header = struct.pack("<8i", 2, 2, 1, 1, 1, 3, 4, 1)  # groups of 1 take 5 bytes a weight
    with pytest.raises(CheckpointError, match=r"220 as .*v0.* or 220 as Kuiper.*not tell them"):
        identify(header, 220)


def test_what_no_file_can_hold_is_refused_without_work_for_each_byte() -> None:
    def seconds(dim: int, hidden_dim: int, vocab_size: int, max_seq_len: int) -> float:
        """Of the processor, at best, for a header of as many tensors whatever their size."""
        heads = min(dim // 2, 4096)
        fields = dim, hidden_dim, 4096, heads, heads, vocab_size, max_seq_len, 64
        found = []
        for _ in range(3):
            start = time.thread_time()
            with pytest.raises(CheckpointError, match="its header makes that"):
                identify(struct.pack("<8i", *fields), 1 << 60)
            found.append(time.thread_time() - start)
        return min(found)

    assert seconds(1 << 20, 1 << 22, 1 << 24, 1 << 27) < 5 * seconds(128, 64, 64, 64)


@given(st.binary(max_size=300), st.integers(0, 1 << 50), st.sampled_from([0, 1, 2]))
def test_any_header_is_taken_or_refused_in_one_line(data: bytes, size: int, version: int) -> None:
    start = b"24ka" + struct.pack("<i", version) if version else b""
    try:
        identify(start + data, size)
    except RooflineError as error:
        assert "\n" not in error.message


@given(st.lists(st.integers(-3, 70), min_size=8, max_size=8), st.integers(0, 1 << 20))
def test_small_headers_of_any_numbers_are_taken_or_refused(fields: list[int], size: int) -> None:
    try:
        contents = identify(struct.pack("<8i", *fields), size)
    except RooflineError as error:
        assert "\n" not in error.message
    else:
        assert contents.size_bytes == size
