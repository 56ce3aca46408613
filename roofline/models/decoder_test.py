"""The decoder over ranks that are threads, against one rank; and over chunks, against one step."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from roofline.budget import Rank, StepShape, plan_model, plan_step_buffers
from roofline.config import ModelConfig, ParallelConfig, WeightFormat
from roofline.models.checkpoints.dummy import DummyCheckpoint
from roofline.models.decoder import Buffers, Decoder, rope_table
from roofline.models.layers import Source
from roofline.ops import KvCache, StepInputs
from roofline.ops.reference import ReferenceOps
from roofline.parallel.collectives import ThreadGroup
from roofline.parallel.mesh import Mesh

SMOLLM2 = ModelConfig(  # with fewer layers, and a vocabulary that leaves ranks unequal shares
    hidden_size=576,
    intermediate_size=1536,
    num_layers=3,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=300,
    max_position=128,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)
FLAGGED = dataclasses.replace(SMOLLM2, qkv_bias=True, qk_norm=True, sliding_window=13)
UNTIED = dataclasses.replace(SMOLLM2, tie_word_embeddings=False)
INT8 = WeightFormat("int8", dtype="float32")
FLOATS = WeightFormat("none", dtype="float32")
BLOCK, ROWS = 16, 3

Chunk = tuple[int, int, Sequence[int]]  # row, position of its first token, token ids


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch: models this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class RankRunner:
    """One rank's decoder, pool and buffers; row r owns every ROWS-th block."""

    def __init__(self, model: ModelConfig, weights: WeightFormat, mesh: Mesh) -> None:
        self.model, self.mesh, rank = model, mesh, mesh.rank
        self.plan = plan_model(model, weights, rank, DummyCheckpoint(model, 7).native_groups)
        source = Source(DummyCheckpoint(model, 7), lambda name: None)
        self.decoder = Decoder(model, self.plan, mesh, source)
        step = StepShape(64, ROWS, model.max_position, BLOCK)
        self.arena = {
            name: torch.zeros(shape, dtype=getattr(torch, dtype))
            for name, (shape, dtype) in plan_step_buffers(model, weights.dtype, rank, step).items()
        }
        rope_table(model, model.max_position, out=self.arena["rope"])
        dtype = getattr(torch, weights.dtype)
        layers = len(rank.parallel.layers(model, rank.stage))
        heads = len(rank.parallel.kv_heads(model, rank.tp_rank))
        blocks = ROWS * step.blocks_per_row
        self.pool = torch.full(
            (layers, 2, blocks, heads, BLOCK, model.head_dim), torch.nan, dtype=dtype
        )
        self.table = torch.arange(blocks, dtype=torch.int32).view(-1, ROWS).t().contiguous()
        self.ops = ReferenceOps(dtype, self.arena["scratch"])

    def step(self, *chunks: Chunk) -> Tensor | None:
        """Logits [T, V] of every token of a step, on the last stage."""
        inputs = self._inputs(chunks)
        count = len(inputs.token_ids)
        names = "residual", "delta", "query", "attended", "activated"
        views = (self.arena[name][:count] for name in names)
        buffers = Buffers(*views, rope=self.arena["rope"])
        self.decoder.forward(self.ops, inputs, KvCache(self.pool, None), buffers)
        if not self.mesh.rank.is_last_stage:
            return None
        out = torch.full((count, self.model.vocab_size), torch.nan)
        mine = self.mesh.rank.parallel.vocabulary(self.model, self.mesh.rank.tp_rank)
        shard = out if len(mine) == self.model.vocab_size else torch.zeros(count, len(mine))
        self.decoder.logits(self.ops, torch.arange(count), buffers, shard, out)
        return out

    def _inputs(self, chunks: Sequence[Chunk]) -> StepInputs:
        token_ids, positions, slots = list[int](), list[int](), list[int]()
        counts, contexts = [0] * (ROWS + 1), [0] * ROWS
        for row, first, ids in sorted(chunks):
            places = range(first, first + len(ids))
            token_ids += ids
            positions += places
            slots += [int(self.table[row, p // BLOCK]) * BLOCK + p % BLOCK for p in places]
            counts[row + 1], contexts[row] = len(ids), first + len(ids)
        return StepInputs(
            token_ids=torch.tensor(token_ids),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_start=torch.tensor(counts).cumsum(0).int(),
            context_len=torch.tensor(contexts).int(),
            block_table=self.table,
        )


IDS = [(37 * i + 11) % 300 for i in range(60)]
STEPS: list[list[Chunk]] = [  # two rows: prompts, a chunk, decoding
    [(0, 0, IDS[:20]), (2, 0, IDS[40:45])],
    [(0, 20, IDS[20:23]), (2, 5, IDS[45:60])],
    [(0, 23, IDS[23:24]), (2, 20, IDS[:1])],
]


def logits_of_ranks(
    model: ModelConfig, weights: WeightFormat, parallel: ParallelConfig
) -> list[list[Tensor]]:
    """Logits of STEPS on every rank of the last stage, the ranks being threads."""
    tp, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    parallel.check(model)
    group = ThreadGroup(tp, stages, timeout_s=60)
    places = [(tp_rank, stage) for stage in range(stages) for tp_rank in range(tp)]

    def work(tp_rank: int, stage: int) -> list[Tensor]:
        mesh = Mesh(Rank(parallel, tp_rank, stage), group.rank(tp_rank, stage))
        runner = RankRunner(model, weights, mesh)
        answers = [runner.step(*chunks) for chunks in STEPS]
        return [answer for answer in answers if answer is not None]

    with ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(work, *place) for place in places]
        return [future.result() for future in futures][-tp:]


def logits_of_one_rank(model: ModelConfig, weights: WeightFormat) -> list[Tensor]:
    runner = RankRunner(model, weights, Mesh.single())
    answers = [runner.step(*chunks) for chunks in STEPS]
    return [answer for answer in answers if answer is not None]


over_flags = pytest.mark.parametrize("model", [SMOLLM2, FLAGGED], ids=["plain", "flagged"])


@over_flags
@pytest.mark.parametrize("weights", [INT8, FLOATS], ids=["int8", "floats"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_tensor_parallel_ranks_give_the_logits_of_one(
    ranks: int, weights: WeightFormat, model: ModelConfig
) -> None:
    parallel = ParallelConfig(ranks)
    widths = [len(parallel.vocabulary(model, rank)) for rank in range(ranks)]
    assert len(set(widths)) > 1
    expected = logits_of_one_rank(model, weights)
    for answers in logits_of_ranks(model, weights, parallel):
        for answer, logits in zip(answers, expected, strict=True):
            assert float((answer - logits).abs().max()) < 1e-5
            assert float(logits.std()) > 0.1, "the test model says something"


def test_every_tensor_rank_has_the_same_bits() -> None:
    first, *others = logits_of_ranks(SMOLLM2, INT8, ParallelConfig(3))
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("model", [SMOLLM2, UNTIED], ids=["tied", "untied"])
def test_pipeline_stages_give_the_bits_of_one(model: ModelConfig, stages: int) -> None:
    (answers,) = logits_of_ranks(model, INT8, ParallelConfig(1, stages))
    assert all(map(torch.equal, answers, logits_of_one_rank(model, INT8)))


def test_tensor_ranks_in_pipeline_stages_give_the_logits_of_one() -> None:
    expected = logits_of_one_rank(UNTIED, INT8)
    for answers in logits_of_ranks(UNTIED, INT8, ParallelConfig(2, 2)):
        for answer, logits in zip(answers, expected, strict=True):
            assert float((answer - logits).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "change", [{"qkv_bias": True}, {"qk_norm": True}, {"sliding_window": 13}], ids=str
)
def test_every_flag_changes_the_logits(change: dict[str, Any]) -> None:
    plain = logits_of_one_rank(SMOLLM2, FLOATS)[0]
    flagged = logits_of_one_rank(dataclasses.replace(SMOLLM2, **change), FLOATS)[0]
    assert float((plain - flagged).abs().max()) > 1e-2


@over_flags
@pytest.mark.parametrize("parallel", [ParallelConfig(1), ParallelConfig(4, 2)], ids=str)
@pytest.mark.parametrize("weights", [INT8, FLOATS, WeightFormat("int8", 32)], ids=str)
def test_a_rank_holds_the_bytes_that_were_planned(
    parallel: ParallelConfig, weights: WeightFormat, model: ModelConfig
) -> None:
    group = ThreadGroup(4, 2)
    for tp_rank in range(parallel.tensor_parallel_size):
        for stage in range(parallel.pipeline_parallel_size):
            mesh = Mesh(Rank(parallel, tp_rank, stage), group.rank(tp_rank, stage))
            runner = RankRunner(model, weights, mesh)
            sizes = {
                name: t.untyped_storage().nbytes() for name, t in runner.decoder.tensors().items()
            }
            scales = sum(size for name, size in sizes.items() if name.endswith(".scales"))
            assert scales == runner.plan.scale_bytes
            assert sum(sizes.values()) - scales == runner.plan.weight_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_have_the_same_bits_at_any_chunking_and_in_any_company(
    dtype: Literal["float32", "bfloat16"],
) -> None:
    model = dataclasses.replace(FLAGGED, num_layers=2)
    weights = WeightFormat("int8", dtype=dtype)
    whole = RankRunner(model, weights, Mesh.single()).step((1, 0, IDS))
    assert whole is not None
    for size in (1, 7, 64):
        runner = RankRunner(model, weights, Mesh.single())
        for step, first in enumerate(range(0, len(IDS), size)):
            mine, before = (1, first, IDS[first : first + size]), [9] * (step % 3)
            company: list[Chunk] = [(0, 0, before), (2, 0, [8, 7])]
            logits = runner.step(mine, *(chunk for chunk in company if chunk[2]))
            assert logits is not None
            logits = logits[len(before) : len(before) + len(mine[2])]
            assert torch.equal(logits, whole[first : first + size]), (size, first)


def test_rope_table_is_exact_at_far_positions() -> None:
    model = dataclasses.replace(SMOLLM2, head_dim=4, max_position=100_000)
    table = torch.zeros(2, 100_000, 2)
    rope_table(model, 100_000, table)
    for position in (0, 1, 8191, 99_999):
        for pair, frequency in enumerate((1.0, 100000.0**-0.5)):
            angle = position * frequency
            cosine, sine = table[:, position, pair].tolist()
            assert cosine == pytest.approx(math.cos(angle), abs=6e-8)
            assert sine == pytest.approx(math.sin(angle), abs=6e-8)
