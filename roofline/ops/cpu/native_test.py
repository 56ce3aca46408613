"""Every native op against its reference twin over odd shapes, at every ISA this machine runs.

A token's result is the same bits alone or in any batch, at any place there, at any thread count.
Attention has a file of its own.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from roofline.budget import quantized_values
from roofline.ops import FloatWeight, Int8Weight, KvCache, Ops, PackedWeight, StepInputs, Weight
from roofline.ops.cpu.library import Library
from roofline.ops.cpu.native import NativeOps, Pool
from roofline.ops.cpu.packing import pack
from roofline.ops.reference import ReferenceOps
from tests.native_library import ISAS, open_native

TOKENS = 200
BATCHES = [range(n) for n in (1, 2, 3, 4, 5, 6, 7, 16, 17, 97)]  # and some in any order
EPS = 1e-5


@dataclass(frozen=True)
class Arithmetic:
    """Of activations: their type, whether INT8 weights round them, how close results must be."""

    dtype: torch.dtype
    int8: bool
    tolerance: float  # of the largest value


FLOAT32 = Arithmetic(torch.float32, False, 1e-5)
ARITHMETICS = {
    "float32": FLOAT32,
    "bfloat16": Arithmetic(torch.bfloat16, False, 8e-3),
    "int8": Arithmetic(torch.bfloat16, True, 2e-2),
}
EVERY_ARITHMETIC = pytest.mark.parametrize("arithmetic", ARITHMETICS.values(), ids=ARITHMETICS)


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer and its tables; group 0 means weights that are floats."""

    hidden: int = 64
    ffn: int = 48
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 16
    vocab: int = 37
    group: int = 32
    offset: int = 0
    extremes: bool = True  # whether -128 occurs
    flagged: bool = False  # a bias and norms of each head
    block_tokens: int = 16


SHAPES = {
    "smollm2": Shape(576, 1536, 9, 3, 64, 300, 128, extremes=False),
    "extremes": Shape(576, 96, 3, 3, 80, 64, 128, flagged=True, block_tokens=32),
    "one row": Shape(vocab=1, group=64, hidden=256),
    "three rows": Shape(vocab=3, group=256, hidden=516, extremes=False),
    "group tails": Shape(hidden=100, head_dim=128, flagged=True, block_tokens=64),
    "less than a group": Shape(hidden=20, group=256),
    "channel": Shape(hidden=132, group=132, ffn=16, extremes=False),
    "cut group": Shape(hidden=100, offset=20, heads=8),
    "cut to one quad": Shape(hidden=4, offset=28, vocab=70),
    "cut channel": Shape(hidden=96, group=1536, offset=700, extremes=False),
    "floats": Shape(group=0, hidden=100, vocab=70, flagged=True),
    "floats of smollm2": Shape(576, 96, 9, 3, 64, 300, group=0),
}
# Of a step and some of its tokens: what an op computes for them, each tensor [tokens, ...].
Run = Callable[["Step", Ops, dict[str, Weight], Tensor], list[Tensor]]


class Step:
    """Weights, and the inputs of 200 tokens, of which ops compute those picked by index."""

    def __init__(self, shape: Shape, arithmetic: Arithmetic) -> None:
        torch.manual_seed(3)
        self.shape, self.arithmetic, self.dtype = shape, arithmetic, arithmetic.dtype
        hidden, dim, heads = shape.hidden, shape.head_dim, shape.heads + 2 * shape.kv_heads
        self.weights: dict[str, Int8Weight | FloatWeight] = {
            "table": self._matrix(shape.vocab),
            "qkv": self._matrix(heads * dim),
            "gate_up": self._matrix(2 * shape.ffn),
        }
        self.ids = torch.randint(0, shape.vocab + 20, (TOKENS,))
        self.x = torch.randn(TOKENS, hidden).to(self.dtype)
        self.x[:, 2::37] *= 50.0  # stretches of INT8 activations get steps of all sizes
        self.residual, self.delta = torch.randn(2, TOKENS, hidden)
        self.norm, self.rope = torch.rand(hidden) + 0.5, torch.randn(2, 50, dim // 2)
        self.positions = torch.randint(0, 50, (TOKENS,))
        self.bias = torch.randn(heads * dim) if shape.flagged else None
        self.q_norm, self.k_norm = torch.rand(2, dim) + 0.5 if shape.flagged else (None, None)
        blocks = TOKENS // shape.block_tokens + 2
        self.slots = torch.randperm(blocks * shape.block_tokens)[:TOKENS]
        self.pool_shape = 2, 2, blocks, shape.kv_heads, shape.block_tokens, dim

    def _matrix(self, rows: int) -> Int8Weight | FloatWeight:
        columns, group, offset = self.shape.hidden, self.shape.group, self.shape.offset
        if not group:
            return FloatWeight((torch.randn(rows, columns) / columns**0.5).to(self.dtype))
        values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        if self.shape.extremes:
            values[:, ::7] = -128
        scales = torch.rand(rows, -(-(columns + offset) // group)) / (60 * columns**0.5)
        return Int8Weight(values, scales, group, offset)

    def packed(self, library: Library) -> dict[str, Weight]:
        """The weights as native ops read them."""
        return {
            name: pack(
                library,
                weight,
                paired=name == "gate_up",
                int8_activations=self.arithmetic.int8,
            )
            for name, weight in self.weights.items()
        }

    def native(self, library: Library, threads: int = 2) -> Callable[[Run, Tensor], list[Tensor]]:
        """Runs ops natively."""
        hidden = self.shape.hidden
        room = TOKENS * (self.weights["qkv"].rows + hidden) + quantized_values(TOKENS, hidden)
        scratch = torch.full((room,), torch.nan)
        ops = NativeOps(
            self.dtype, scratch, torch.zeros(4, dtype=torch.int64), Pool(library, threads)
        )
        weights = self.packed(library)
        return lambda run, picked: run(self, ops, weights, picked)

    def reference(self, run: Run, picked: Tensor) -> list[Tensor]:
        """What the definition says."""
        rounded = self.arithmetic.int8
        scratch = torch.zeros(100_000)
        ops = ReferenceOps(self.dtype, scratch, int8_activations=rounded, stretches=True)
        return run(self, ops, {**self.weights}, picked)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An output that nobody has written."""
        return torch.full(shape, torch.nan, dtype=dtype)


def embed(step: Step, ops: Ops, weights: dict[str, Weight], picked: Tensor) -> list[Tensor]:
    out = step.empty(len(picked), step.shape.hidden)
    ops.embed(step.ids[picked], weights["table"], 10, out)
    return [out]


def linear(step: Step, ops: Ops, weights: dict[str, Weight], picked: Tensor) -> list[Tensor]:
    out = step.empty(len(picked), step.shape.vocab)
    ops.linear(step.x[picked], weights["table"], out)
    return [out]


def norm_gate_up_swiglu(
    step: Step, ops: Ops, weights: dict[str, Weight], picked: Tensor
) -> list[Tensor]:
    out = step.empty(len(picked), step.shape.ffn, dtype=step.dtype)
    residual = step.residual[picked]
    delta = step.delta[picked]
    ops.norm_gate_up_swiglu(residual, delta, step.norm, EPS, weights["gate_up"], out)
    return [residual, out]


def norm_head(step: Step, ops: Ops, weights: dict[str, Weight], picked: Tensor) -> list[Tensor]:
    wide = step.empty(len(picked), step.shape.vocab + 5)  # as a rank's share of all the logits
    out = wide[:, : step.shape.vocab]
    ops.norm_head(step.residual, step.delta, picked, step.norm, EPS, weights["table"], out)
    assert wide[:, step.shape.vocab :].isnan().all()
    assert ops.all_finite(out) == bool(out.isfinite().all())
    return [out]


def norm_qkv_rope_store(
    step: Step, ops: Ops, weights: dict[str, Weight], picked: Tensor
) -> list[Tensor]:
    shape, slots = step.shape, step.slots[: len(picked)]
    unused = torch.zeros(1, dtype=torch.int32)
    inputs = StepInputs(picked, step.positions[picked], slots, unused, unused, unused)
    pool = torch.full(step.pool_shape, 7.0, dtype=step.dtype)
    out = step.empty(len(picked), shape.heads, shape.head_dim, dtype=step.dtype)
    residual = step.residual[picked]
    delta = None if shape.hidden == 20 else step.delta[picked]  # the first layer has none
    ops.norm_qkv_rope_store(
        residual, delta, step.norm, EPS, weights["qkv"], step.bias, step.q_norm, step.k_norm,
        step.rope, inputs, KvCache(pool, None), 1, out,
    )  # fmt: skip
    stored = pool.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).clone()  # [layers, slots, 2, Hkv, D]
    written = stored[1, slots].clone()
    stored[1, slots] = 7.0
    assert (stored == 7.0).all(), "a slot of nobody's was written"
    return [residual, out, written]


OPS = {run.__name__: run for run in (
    embed, linear, norm_gate_up_swiglu, norm_head, norm_qkv_rope_store,
)}  # fmt: skip
EVERY_OP = pytest.mark.parametrize("op", OPS)


@pytest.fixture(scope="module", params=ISAS)
def library(request: pytest.FixtureRequest) -> Library:
    return open_native(request.param)


@functools.cache
def wanted(name: str, arithmetic: Arithmetic, op: str) -> list[Tensor]:
    return Step(SHAPES[name], arithmetic).reference(OPS[op], torch.arange(TOKENS))


def assert_close(
    actual: Iterable[Tensor], expected: Iterable[Tensor], op: str, arithmetic: Arithmetic
) -> None:
    """Within tolerance; NaN and inf in the same places."""
    tolerance = FLOAT32.tolerance if op in ("embed", "linear") else arithmetic.tolerance
    for mine, theirs in zip(actual, expected, strict=True):
        limit = tolerance * float(theirs.float().nan_to_num(0, 0, 0).abs().max().clamp(1))
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=0, atol=limit, equal_nan=True)


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [t.view(torch.int32 if t.dtype == torch.float32 else torch.int16) for t in tensors]


@EVERY_OP
@EVERY_ARITHMETIC
@pytest.mark.parametrize("name", SHAPES)
def test_it_computes_what_the_reference_does_in_any_batch(
    library: Library, name: str, arithmetic: Arithmetic, op: str
) -> None:
    compute = Step(SHAPES[name], arithmetic).native(library)
    together = compute(OPS[op], torch.arange(TOKENS))
    assert_close(together, wanted(name, arithmetic, op), op, arithmetic)
    shuffled = [torch.randperm(TOKENS)[:n] for n in (1, 2, 9, 33, TOKENS)]
    for picked in [*map(torch.tensor, BATCHES), *shuffled, torch.tensor([199, 0, 0])]:
        for mine, all_of_them in zip(bits(compute(OPS[op], picked)), bits(together), strict=True):
            assert torch.equal(mine, all_of_them[picked]), len(picked)


@EVERY_OP
@EVERY_ARITHMETIC
def test_threads_change_no_bit(library: Library, arithmetic: Arithmetic, op: str) -> None:
    step = Step(SHAPES["smollm2"], arithmetic)
    for count in (1, 5, 97):
        first, *others = (
            bits(step.native(library, threads)(OPS[op], torch.arange(count)))
            for threads in (1, 2, 3)
        )
        for other in others:
            assert all(map(torch.equal, first, other)), count


@pytest.mark.parametrize("op", [op for op in OPS if op != "embed"])
@EVERY_ARITHMETIC
@pytest.mark.parametrize("name", ["smollm2", "extremes", "floats"])
def test_nan_and_inf_go_where_they_go_in_the_reference(
    library: Library, name: str, arithmetic: Arithmetic, op: str
) -> None:
    clean, step = Step(SHAPES[name], arithmetic), Step(SHAPES[name], arithmetic)
    poisoned = {3: torch.nan, 17: torch.inf, 40: -torch.inf, 111: torch.nan}
    for token, poison in poisoned.items():
        step.x[token, 5] = step.residual[token, 99] = poison
    step.delta[150, 7], poisoned[150] = torch.inf, torch.inf
    others = [token for token in range(TOKENS) if token not in poisoned]
    picked = torch.arange(TOKENS)
    actual = step.native(library)(OPS[op], picked)
    assert_close(actual, step.reference(OPS[op], picked), op, arithmetic)
    untouched = clean.native(library)(OPS[op], picked)
    for mine, theirs in zip(bits(actual), bits(untouched), strict=True):
        assert torch.equal(mine[others], theirs[others])


@EVERY_ARITHMETIC
def test_numbers_too_small_to_be_normal_count_alike_in_any_batch(
    library: Library, arithmetic: Arithmetic
) -> None:
    step = Step(SHAPES["smollm2"], arithmetic)
    step.x *= torch.logspace(-43, -33, step.shape.hidden).to(step.dtype)
    compute = step.native(library)
    (together,) = bits(compute(linear, torch.arange(40)))
    for count in (1, 2, 3, 5, 16):
        (some,) = bits(compute(linear, torch.arange(count)))
        assert torch.equal(some, together[:count]), count


@EVERY_ARITHMETIC
def test_a_table_of_nan_and_inf_is_looked_up_as_it_is(
    library: Library, arithmetic: Arithmetic
) -> None:
    step = Step(SHAPES["floats"], arithmetic)
    step.weights["table"].values[20, 5:8] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    step.ids[6] = 30
    picked = torch.arange(9)
    actual, expected = step.native(library)(embed, picked), step.reference(embed, picked)
    assert_close(actual, expected, "embed", arithmetic)


def test_silu_of_an_extreme_gate_is_finite(library: Library) -> None:
    step = Step(Shape(hidden=4, ffn=16, group=0), FLOAT32)
    gates = torch.tensor([-1e30, -200.0, -88.0, -30.0, -1e-30, 0.0, 1e-30, 30.0, 88.0, 200.0, 1e30])
    matrix = step.weights["gate_up"].values.fill_(0)
    matrix[: len(gates), 0], matrix[16:, 0] = gates, 1.0
    step.residual[0], step.delta[0], step.norm = torch.tensor([1.0, 0, 0, 0]), 0, torch.ones(4) / 2
    _, out = step.native(library)(norm_gate_up_swiglu, torch.tensor([0]))
    _, expected = step.reference(norm_gate_up_swiglu, torch.tensor([0]))
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=0)
    assert out.isfinite().all()


def test_a_step_without_tokens_writes_nothing(library: Library) -> None:
    compute = Step(SHAPES["floats"], FLOAT32).native(library)
    for op in OPS.values():
        assert all(len(result) == 0 for result in compute(op, torch.arange(0)))


def test_a_slot_of_minus_one_is_not_written(library: Library) -> None:
    step = Step(SHAPES["smollm2"], FLOAT32)
    step.slots[:] = -1

    def stored(step: Step, ops: Ops, weights: dict[str, Weight], picked: Tensor) -> list[Tensor]:
        padded = torch.full((step.pool_shape[2] + 2, *step.pool_shape[3:]), 7.0)
        pool = padded[1:-1].expand(2, 2, *padded[1:-1].shape)  # what lies around it shows, too
        inputs = StepInputs(picked, picked, step.slots[: len(picked)], picked, picked, picked)
        out = step.empty(len(picked), step.shape.heads, step.shape.head_dim)
        ops.norm_qkv_rope_store(
            step.residual[picked], None, step.norm, EPS, weights["qkv"], None, None, None,
            step.rope, inputs, KvCache(pool, None), 0, out,
        )  # fmt: skip
        assert not out.isnan().any()
        return [padded]

    for padded in (
        step.native(library)(stored, torch.arange(9)),
        step.reference(stored, torch.arange(9)),
    ):
        assert (padded[0] == 7.0).all()


def test_packed_weights_are_the_backends_alone() -> None:
    weight = PackedWeight(torch.zeros(1), None, 1, None)
    with pytest.raises(AssertionError, match="packed for another backend"):
        ReferenceOps(torch.float32, torch.zeros(9)).linear(
            torch.zeros(1, 4), weight, torch.zeros(1, 1)
        )
