import random
from dataclasses import dataclass, field

import numpy as np
import torch

from roofline.budget import Rank, StepShape, plan_step_buffers
from roofline.config import PRESETS
from roofline.execution import arena
from roofline.execution.inputs import InputTables, step_inputs
from roofline.scheduling.plan import ON_DEVICE, RowStart, StepPlan

ROWS, BLOCK, LONGEST, STEP_TOKENS = 5, 4, 40, 64


@dataclass
class Row:
    """What a row must look like: its tokens' ids and blocks, as far as they are computed."""

    ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class Model:
    """Makes random plans, and says by brute force what they mean."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rows: dict[int, Row] = {}
        step = StepShape(STEP_TOKENS, ROWS, LONGEST, BLOCK)
        buffers = plan_step_buffers(PRESETS["llama-110m"], "bfloat16", Rank(), step)
        small = ("residual", "delta", "query", "attended", "activated", "scratch", "logits", "rope")
        self.arena = arena.allocate({n: b for n, b in buffers.items() if n not in small})
        self.tables = InputTables(self.arena, BLOCK)

    def plan(self, step: int) -> StepPlan:
        plan = StepPlan(step)
        for row in self.random.sample(range(ROWS), self.random.randint(1, ROWS)):
            cached: list[int] = []
            if row not in self.rows or self.random.random() < 0.15 or self._full(row):
                plan.starts.append(RowStart(row=row, num_prompt=1, seed=0))
                cached = [self.random.randrange(1000) for _ in range(self.random.randint(0, 3))]
                shared = [self.random.randrange(9) for _ in range(len(cached) * BLOCK)]
                self.rows[row] = Row(shared, list(cached))
            self._add_entry(plan, row, cached)
        return plan

    def _full(self, row: int) -> bool:
        return len(self.rows[row].ids) == LONGEST

    def _add_entry(self, plan: StepPlan, row: int, cached: list[int]) -> None:
        state = self.rows[row]
        position = len(state.ids)
        count = self.random.choice([1, 1, self.random.randint(1, min(12, LONGEST - position))])
        ids = [self.random.randrange(5000) for _ in range(count)]
        state.ids += ids
        fresh = -(-len(state.ids) // BLOCK) - len(state.blocks)
        new = [self.random.randrange(1000) for _ in range(fresh)]
        state.blocks += new
        if count == 1 and self.random.random() < 0.5:
            self.arena["last_token"][row] = ids[0]
            ids = [ON_DEVICE]
        plan.add(row, position, ids, self.random.randint(0, 1), cached + new)

    def check(self, plan: StepPlan) -> None:
        tokens, entries = self.tables.fill(plan)
        inputs = step_inputs(self.arena, tokens)
        assert sorted(entry.index for entry in entries) == list(range(len(plan.rows)))
        assert [entry.row for entry in entries] == sorted(plan.rows)
        total = 0
        for entry in entries:
            row, span = self.rows[entry.row], slice(total, total + entry.count)
            first = len(row.ids) - entry.count
            place = (entry.first_token, entry.position, entry.samples)
            assert place == (total, first, plan.samples[entry.index])
            positions = range(first, len(row.ids))
            assert inputs.token_ids[span].tolist() == row.ids[first:]
            assert inputs.positions[span].tolist() == list(positions)
            slots = [row.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in positions]
            assert inputs.slots[span].tolist() == slots
            assert inputs.block_table[entry.row, : len(row.blocks)].tolist() == row.blocks
            total += entry.count
        computed = dict(zip(plan.rows, plan.counts, strict=True))
        sizes = [computed.get(row, 0) for row in range(ROWS)]
        assert inputs.query_start.tolist() == [0, *np.cumsum(sizes).tolist()]
        contexts = [len(self.rows[row].ids) if row in computed else 0 for row in range(ROWS)]
        assert inputs.context_len.tolist() == contexts
        assert len(inputs.token_ids) == len(inputs.positions) == len(inputs.slots) == total


def test_random_plans_fill_the_tables_as_brute_force_does() -> None:
    for seed in range(20):
        model = Model(seed)
        for step in range(60):
            model.check(model.plan(step))


def test_every_input_is_a_view_of_the_arena() -> None:
    model = Model(0)
    tokens, _ = model.tables.fill(model.plan(0))
    inputs = step_inputs(model.arena, tokens)
    storages = {t.untyped_storage().data_ptr() for t in model.arena.values()}
    assert inputs.longest is None  # of steps that a device plans
    for tensor in (value for name, value in vars(inputs).items() if name != "longest"):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.untyped_storage().data_ptr() in storages


def test_a_row_that_starts_again_forgets_its_blocks() -> None:
    model = Model(0)
    for first_block in (7, 3):
        plan = StepPlan(0, [RowStart(row=2, num_prompt=1, seed=0)])
        plan.add(2, 0, [1, 2, 3], 0, [first_block])
        model.tables.fill(plan)
        assert model.arena["block_table"][2, 0] == first_block
        assert model.arena["slots"][:3].tolist() == [first_block * BLOCK + i for i in range(3)]
