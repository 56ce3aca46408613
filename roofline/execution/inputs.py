"""From a plan to the device-side tables: who computes which tokens, and where their KV goes."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from roofline.execution.arena import Arena
from roofline.ops import StepInputs
from roofline.scheduling.plan import ON_DEVICE, StepPlan


@dataclass(frozen=True)
class Entry:
    """A plan's entry after filling: which tokens of the step are its own."""

    index: int  # place in the plan
    row: int
    first_token: int  # place of its first token in the step
    count: int
    position: int  # of its first token in the request
    samples: int  # trailing tokens whose logits are sampled


class InputTables:
    """Writes plans into the arena; keeps each row's block count between steps."""

    def __init__(self, arena: Arena, block_size: int) -> None:
        names = "token_ids", "positions", "slots", "query_start", "context_len", "block_table"
        self._views = {name: arena[name].numpy() for name in (*names, "last_token", "step")}
        self._arena, self._block_size = arena, block_size
        self.choices = Choices(arena)
        self._held = [0] * arena["block_table"].shape[0]  # blocks in each row's table

    def fill(self, plan: StepPlan) -> tuple[StepInputs, list[Entry]]:
        """Apply the plan's changes; the step's tokens are laid out in the order of rows."""
        for start in plan.starts:
            self._held[start.row] = 0
        entries = self._entries(plan)
        context_len, query_start = self._views["context_len"], self._views["query_start"]
        context_len[:] = 0
        query_start[:] = 0
        for entry in entries:
            context_len[entry.row] = entry.position + entry.count
            query_start[entry.row + 1] = entry.count
        np.cumsum(query_start, out=query_start)
        total = int(query_start[-1])
        self._views["step"][:] = total, 0, len(context_len)
        return self._step_inputs(total), entries

    def largest(self) -> StepInputs:
        """The inputs of a step as large as one can be."""
        return self._step_inputs(len(self._views["token_ids"]))

    def _entries(self, plan: StepPlan) -> list[Entry]:
        """Write tokens, positions, blocks and slots entry by entry."""
        tokens_at, blocks_at = _offsets(plan.counts), _offsets(plan.block_counts)
        entries: list[Entry] = []
        total = 0
        for index in sorted(range(len(plan.rows)), key=plan.rows.__getitem__):
            row, count, position = plan.rows[index], plan.counts[index], plan.positions[index]
            self._extend_table(row, plan.block_ids[blocks_at[index] : blocks_at[index + 1]])
            ids = np.array(plan.token_ids[tokens_at[index] : tokens_at[index + 1]], dtype=np.int64)
            ids[ids == ON_DEVICE] = self._views["last_token"][row]
            places = np.arange(position, position + count)
            part = slice(total, total + count)
            self._views["token_ids"][part] = ids
            self._views["positions"][part] = places
            blocks = self._views["block_table"][row, places // self._block_size].astype(np.int64)
            self._views["slots"][part] = blocks * self._block_size + places % self._block_size
            entries.append(Entry(index, row, total, count, position, plan.samples[index]))
            total += count
        return entries

    def _extend_table(self, row: int, blocks: list[int]) -> None:
        held = self._held[row]
        self._views["block_table"][row, held : held + len(blocks)] = blocks
        self._held[row] = held + len(blocks)

    def _step_inputs(self, tokens: int) -> StepInputs:
        arena = self._arena

        def head(name: str) -> Tensor:
            return arena[name][:tokens]

        return StepInputs(
            token_ids=head("token_ids"),
            positions=head("positions"),
            slots=head("slots"),
            query_start=arena["query_start"],
            context_len=arena["context_len"],
            block_table=arena["block_table"],
        )


class Choices:
    """What `Ops.choose` is told of each sampled token, and what it answers."""

    def __init__(self, arena: Arena) -> None:
        names = "temperature", "seed", "choice_position", "chosen"
        views = (arena[name].numpy() for name in names)
        self._temperature, self._seed, self._position, self._chosen = views
        self.last_token = arena["last_token"].numpy()

    def set(self, place: int, temperature: float, seed: int, position: int) -> None:
        """Say how the token of one row of logits is chosen."""
        self._temperature[place], self._position[place] = temperature, position
        self._seed[place] = seed - (1 << 64) if seed >= 1 << 63 else seed

    def chosen(self, count: int) -> list[int]:
        """The first `count` tokens."""
        return self._chosen[:count].tolist()


def _offsets(counts: list[int]) -> list[int]:
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return offsets
