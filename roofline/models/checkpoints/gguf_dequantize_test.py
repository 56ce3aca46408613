import tracemalloc
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from roofline.errors import CheckpointError, UnsupportedError
from roofline.models.checkpoints.gguf_dequantize import (
    FORMATS,
    BlockFormat,
    block_format,
    dequantize,
    q8_0_groups,
)

HALVES = [  # every fp16 that a block format holds
    (type_name, field)
    for type_name, block in FORMATS.items()
    for field in block.layout.names or ()
    if field in ("scale", "minimum")
]


def oracle(raw: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    rows = raw.reshape(-1, FORMATS[type_name].nbytes)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type_name]).reshape(-1)


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


def random_blocks(type_name: str, count: int, seed: int) -> NDArray[np.uint8]:
    nbytes = count * FORMATS[type_name].nbytes
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def q8_0(scales: list[float], quants: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The bytes of Q8_0 blocks, from one scale and [32] values a block."""
    blocks = np.empty(len(scales), FORMATS["Q8_0"].layout)
    blocks["scale"], blocks["quants"] = scales, quants
    return blocks.view(np.uint8)


@pytest.mark.parametrize("type_name", FORMATS)
def test_block_sizes_are_those_of_gguf(type_name: str) -> None:
    block: BlockFormat = FORMATS[type_name]
    expected = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    assert (block.elements, block.nbytes) == expected


@pytest.mark.parametrize("count", [1, 3, 9001])  # 9001: over several slabs, the last one partial
@pytest.mark.parametrize("type_name", FORMATS)
def test_random_bytes_dequantise_to_the_bits_of_gguf(type_name: str, count: int) -> None:
    raw = random_blocks(type_name, count, seed=count)
    found = dequantize(raw, type_name, count * FORMATS[type_name].elements)
    assert_same_bits(found, oracle(raw, type_name))


@pytest.mark.parametrize(("type_name", "field"), HALVES)
def test_every_kind_of_half_as_scale_gives_the_bits_of_gguf(type_name: str, field: str) -> None:
    halves = np.arange(0, 1 << 16, 5, dtype=np.uint16)  # denormals, infinities and NaNs among them
    raw = random_blocks(type_name, len(halves), seed=0)
    blocks = raw.view(FORMATS[type_name].layout)
    blocks[field] = halves.view(np.float16)
    found = dequantize(raw, type_name, len(halves) * FORMATS[type_name].elements)
    assert_same_bits(found, oracle(raw, type_name))


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_every_16_bit_float_becomes_the_float32_of_gguf(type_name: str) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    assert_same_bits(dequantize(raw, type_name, 1 << 16), oracle(raw, type_name))


def test_values_do_not_share_memory_with_unaligned_read_only_bytes() -> None:
    padded = np.zeros(1 + 4 * 6, np.uint8)
    padded[1:] = np.arange(6, dtype=np.float32).view(np.uint8)
    padded.flags.writeable = False
    values = dequantize(padded[1:], "F32", 6)
    values += 1
    assert values.tolist() == [1, 2, 3, 4, 5, 6]
    assert padded[1:].view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("type_name", FORMATS)
def test_temporaries_stay_small_beside_a_large_result(type_name: str) -> None:
    elements = 1 << 22
    raw = random_blocks(type_name, elements // FORMATS[type_name].elements, seed=1)
    tracemalloc.start()
    values = dequantize(raw, type_name, elements)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < values.nbytes + (4 << 20)


@pytest.mark.parametrize("elements", [32, 95, 97, 128])
def test_bytes_that_do_not_match_the_number_of_weights_are_refused(elements: int) -> None:
    with pytest.raises(CheckpointError, match=f"cannot hold {elements} weights"):
        dequantize(random_blocks("Q4_0", 3, seed=0), "Q4_0", elements)


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"IQ4_XS is not supported.*Q4_1.*Q6_K"):
        block_format("IQ4_XS")


def test_q8_0_groups_times_their_scales_are_the_dequantised_weights() -> None:
    quants = np.random.default_rng(2).integers(-128, 128, (6, 32)).astype(np.int8)
    raw = q8_0([0.5, -0.25, 6e-8, 65504, 1e-5, 3], quants)  # 6e-8 is a subnormal half
    values, scales = q8_0_groups(raw, 2, 96)
    assert (values.dtype, scales.dtype) == (np.int8, np.float32)
    assert (values.shape, scales.shape) == ((2, 96), (2, 3))
    product = values.reshape(2, 3, 32) * scales[:, :, None]
    assert_same_bits(product.reshape(-1), dequantize(raw, "Q8_0", 192))


def test_q8_0_keeps_minus_128() -> None:
    values, _ = q8_0_groups(q8_0([1.0], np.full((1, 32), -128, np.int8)), 1, 32)
    assert values.tolist() == [[-128] * 32]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_q8_0_scale_of_zero_becomes_one_over_zeros(zero: float) -> None:
    quants = np.full((2, 32), 7, np.int8)
    values, scales = q8_0_groups(q8_0([zero, 2.0], quants), 1, 64)
    assert scales.tolist() == [[1.0, 2.0]]
    assert values.tolist() == [[0] * 32 + [7] * 32]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_q8_0_scale_that_is_no_number_is_refused_with_its_place(bad: float) -> None:
    raw = q8_0([1.0, 1.0, 1.0, bad], np.zeros((4, 32), np.int8))
    with pytest.raises(CheckpointError, match=f"row 1, group 1 is {bad}"):
        q8_0_groups(raw, 2, 64)


def test_a_signalling_nan_scale_is_refused_without_a_warning() -> None:
    raw: NDArray[Any] = q8_0([1.0], np.zeros((1, 32), np.int8))
    raw[:2] = [0x01, 0x7C]
    with pytest.raises(CheckpointError, match="nan"):
        q8_0_groups(raw, 1, 32)
