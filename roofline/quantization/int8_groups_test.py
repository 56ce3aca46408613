import itertools
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from roofline.budget import Rank, plan_model
from roofline.config import GROUP_SIZES, PRESETS, WeightFormat
from roofline.errors import CheckpointError
from roofline.ops import Int8Weight
from roofline.quantization import int8_groups
from roofline.quantization.int8_groups import cut_columns, quantize

TINY = np.finfo(np.float32).tiny
KINDS = ("normal", "any bits", "subnormal", "huge", "zero", "near ties", "one large")


def group_of(kind: str, size: int, random: np.random.Generator) -> np.ndarray:
    """Float32 weights [size] that are hard in one way or another."""
    normal = random.standard_normal(size).astype(np.float32)
    if kind == "any bits":
        bits = random.integers(0, 1 << 32, size, dtype=np.uint32).view(np.float32)
        return np.where(np.isfinite(bits), bits, np.float32(0))
    if kind == "subnormal":
        return random.integers(0, 1 << 23, size, dtype=np.uint32).view(np.float32)
    if kind == "near ties":
        scale = np.float32(random.uniform(1, 2))
        steps = random.integers(-126, 126, size) + 0.5
        ties = (steps * np.float64(scale)).astype(np.float32)
        ties[0] = np.float32(127) * scale
        return np.nextafter(ties, np.float32(random.choice([-1e30, 1e30])))
    if kind == "one large":
        normal[0] *= np.float32(1e6)
    factors = {"huge": np.float32(1e37), "zero": np.float32(0)}
    return normal * factors.get(kind, np.float32(1))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """A float32 matrix [N, K] and a group size; K need not divide."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 300))
    group = draw(st.sampled_from([*GROUP_SIZES, columns]))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    weights = np.empty((rows, columns), np.float32)
    for row, start in itertools.product(range(rows), range(0, columns, group)):
        stop = min(start + group, columns)
        kind = draw(st.sampled_from(KINDS))
        weights[row, start:stop] = group_of(kind, stop - start, random)
    return weights, group


def by_definition(weights: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The formulas of the module's docstring, group by group, in numpy's float32."""
    rows, columns = weights.shape
    values = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, -(-columns // group)), np.float32)
    for row, g in itertools.product(range(rows), range(scales.shape[1])):
        part = slice(g * group, (g + 1) * group)
        scale = np.abs(weights[row, part]).max() / np.float32(127)
        scales[row, g] = scale if scale >= TINY else np.float32(1)
        values[row, part] = np.rint(weights[row, part] / scales[row, g])
    return values, scales


def column_scales(weight: Int8Weight) -> Tensor:
    """The scale of every weight, [N, K] float64."""
    columns = torch.arange(weight.values.shape[1])
    return weight.scales.double()[:, (columns + weight.offset) // weight.group]


@given(matrices())
def test_bits_are_those_of_the_definition(case: tuple[np.ndarray, int]) -> None:
    weights, group = case
    found = quantize(torch.from_numpy(weights), group, "w")
    values, scales = by_definition(weights, group)
    assert np.array_equal(found.scales.numpy(), scales)
    assert np.array_equal(found.values.numpy(), values)
    assert (found.group, found.offset) == (group, 0)


@given(matrices())
def test_no_weight_is_off_by_more_than_the_bound(case: tuple[np.ndarray, int]) -> None:
    weights, group = case
    found = quantize(torch.from_numpy(weights), group, "w")
    scales = column_scales(found)
    error = (torch.from_numpy(weights).double() - found.values.double() * scales).abs()
    assert (error <= scales / 2 * (1 + 2**-17)).all()
    assert found.values.min() >= -127
    assert found.scales.isfinite().all() and (found.scales >= TINY).all()


def test_bound_is_as_small_as_it_can_be() -> None:
    """The quotient of these is rounded to a tie, and the tie to the farther integer."""
    scale = np.float32(1.0088583)
    largest = np.float32(127) * scale
    scale = largest / np.float32(127)
    off = np.float32(125.5 * np.float64(scale))
    ties = [np.nextafter(off, np.float32(side)) for side in (0, 1e30)]
    found = quantize(torch.tensor([[largest, off, *ties]]), 32, "w")
    weights = np.array([off, *ties], np.float64)
    error = np.abs(weights - found.values.numpy()[0, 1:] * np.float64(scale))
    assert (error / (np.float64(scale) / 2) - 1).max() > 2**-19


def test_ties_go_to_the_even_integer() -> None:
    weights = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5]])
    found = quantize(weights, 32, "w")
    assert found.scales.item() == 1.0
    assert found.values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, 126, -126]]


def test_group_without_a_normal_scale_has_scale_one_and_zeros() -> None:
    largest = np.nextafter(np.float32(127) * TINY, np.float32(0))
    weights = torch.zeros(3, 32)
    weights[1, 5], weights[2, 5] = float(largest), float(127 * TINY)
    found = quantize(weights, 32, "w")
    assert found.scales.flatten().tolist() == [1.0, 1.0, float(TINY)]
    assert found.values[:2].count_nonzero() == 0
    assert found.values[2, 5] == 127


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantised_as_the_floats_it_stands_for(dtype: torch.dtype) -> None:
    weights = torch.randn(5, 200).to(dtype)
    found, wanted = quantize(weights, 64, "w"), quantize(weights.float(), 64, "w")
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.scales, wanted.scales)


@pytest.mark.parametrize("group", [32, 64, 128, 256, 200])
@pytest.mark.parametrize("slab_values", [1, 401, 1000])
def test_slabs_leave_no_seam(monkeypatch: pytest.MonkeyPatch, group: int, slab_values: int) -> None:
    weights = torch.randn(7, 200)
    wanted = quantize(weights, group, "w")
    monkeypatch.setattr(int8_groups, "SLAB_VALUES", slab_values)
    found = quantize(weights, group, "w")
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found.scales, wanted.scales)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_that_is_no_number_is_refused_with_the_name_of_its_tensor(
    bad: float, place: int, dtype: torch.dtype
) -> None:
    weights = torch.ones(3, 100, dtype=dtype)
    weights[2, place] = bad
    with pytest.raises(CheckpointError, match=r"tensor 'model.x.weight' holds NaN"):
        quantize(weights, 64, "model.x.weight")


@pytest.mark.parametrize("group", [1, 3, 32, 64, 256])
def test_every_cut_has_the_values_and_scales_of_the_whole(group: int) -> None:
    columns = 70
    whole = quantize(torch.randn(2, columns), group, "w")
    scales = column_scales(whole)
    for start, stop in itertools.combinations(range(columns + 1), 2):
        part = cut_columns(whole, range(start, stop))
        assert torch.equal(part.values, whole.values[:, start:stop])
        assert torch.equal(column_scales(part), scales[:, start:stop])
        assert 0 <= part.offset < group
        assert part.scales.shape[1] == -(-(part.offset + stop - start) // group)


def test_cut_of_a_cut_is_a_cut_of_the_whole() -> None:
    whole = quantize(torch.randn(2, 100), 32, "w")
    once = cut_columns(whole, range(20, 90))
    for start, stop in itertools.combinations(range(71), 2):
        twice = cut_columns(once, range(start, stop))
        wanted = cut_columns(whole, range(20 + start, 20 + stop))
        assert torch.equal(twice.values, wanted.values)
        assert torch.equal(twice.scales, wanted.scales)
        assert twice.offset == wanted.offset


def test_documented_sizes_are_those_of_the_plan() -> None:
    text = (Path(__file__).parents[2] / "docs" / "int8_groups.md").read_text()
    model = PRESETS["llama-3.1-8b"]
    floats = plan_model(model, WeightFormat("none"), Rank(), {})
    assert f"{floats.parameters:,} parameters, {floats.weight_bytes:,} bytes" in text
    sizes: list[Literal["channel"] | int] = [*GROUP_SIZES, "channel"]
    for size in sizes:
        plan = plan_model(model, WeightFormat(group_size=size), Rank(), {})
        total = plan.weight_bytes + plan.scale_bytes
        share, of_floats = total / plan.parameters, total / floats.weight_bytes
        cells = (plan.weight_bytes, plan.scale_bytes, total)
        row = " | ".join(f"{cell:,}" for cell in cells)
        assert f"| {size} | {row} | {share:.4f} | {of_floats:.1%} |".replace("%", " %") in text
