"""From a plan to the device-side tables: who computes which tokens, and where their KV goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
        self._views = {name: arena[name].numpy() for name in (*names, "last_token")}
        self._block_size = block_size
        self.choices = Choices(arena)
        self._held = [0] * arena["block_table"].shape[0]  # blocks in each row's table

    def fill(self, plan: StepPlan) -> tuple[int, list[Entry]]:
        """Apply the plan's changes; return the step's tokens, laid out in the order of rows."""
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
        return int(query_start[-1]), entries

    def _entries(self, plan: StepPlan) -> list[Entry]:
        """Write tokens, positions, blocks and slots entry by entry."""
        tokens_at, blocks_at = _offsets(plan.counts), _offsets(plan.block_counts)
        entries: list[Entry] = []
        total = 0
        for index in sorted(range(len(plan.rows)), key=plan.rows.__getitem__):
            row, count, position = plan.rows[index], plan.counts[index], plan.positions[index]
            self._extend_table(row, plan.block_ids[blocks_at[index] : blocks_at[index + 1]])
            ids = plan.token_ids[tokens_at[index] : tokens_at[index + 1]]
            if count == 1:
                self._write_token(total, row, ids[0], position)
            else:
                self._write_tokens(total, row, ids, position)
            entries.append(Entry(index, row, total, count, position, plan.samples[index]))
            total += count
        return entries

    def _extend_table(self, row: int, blocks: list[int]) -> None:
        held = self._held[row]
        self._views["block_table"][row, held : held + len(blocks)] = blocks
        self._held[row] = held + len(blocks)

    def _write_tokens(self, first: int, row: int, ids: list[int], position: int) -> None:
        """A chunk of a prompt, whose ids are known."""
        views, size, part = self._views, self._block_size, slice(first, first + len(ids))
        places = np.arange(position, position + len(ids))
        blocks = views["block_table"][row, places // size].astype(np.int64)
        views["token_ids"][part], views["positions"][part] = ids, places
        views["slots"][part] = blocks * size + places % size

    def _write_token(self, at: int, row: int, token: int, position: int) -> None:
        """One token, perhaps the row's last sampled; by itself, for every decoding step has it."""
        views, size = self._views, self._block_size
        views["token_ids"][at] = views["last_token"][row] if token == ON_DEVICE else token
        views["positions"][at] = position
        block = int(views["block_table"][row, position // size])
        views["slots"][at] = block * size + position % size


def step_inputs(arena: Arena, tokens: int, longest: int | None = None) -> StepInputs:
    """The inputs of a step of so many tokens, of which a row has `longest` at most."""
    return StepInputs(
        token_ids=arena["token_ids"][:tokens],
        positions=arena["positions"][:tokens],
        slots=arena["slots"][:tokens],
        query_start=arena["query_start"],
        context_len=arena["context_len"],
        block_table=arena["block_table"],
        longest=longest,
    )


class Choice(NamedTuple):
    """How the token of one row of logits is chosen."""

    min_p: float
    top_k: int
    top_p: float
    temperature: float
    seed: int  # signed: the bits of an unsigned number
    position: int


class Choices:
    """What `Ops.truncate` and `Ops.choose` are told of each sampled token, and what is chosen."""

    def __init__(self, arena: Arena) -> None:
        names = "min_p", "top_k", "top_p", "temperature", "seed", "choice_position"
        self._columns = [arena[name].numpy() for name in names]
        self._chosen = arena["chosen"].numpy()
        self.last_token = arena["last_token"].numpy()

    def set(self, rows: Sequence[Choice]) -> None:
        """Say how the tokens of the first rows of logits are chosen."""
        for column, values in zip(self._columns, zip(*rows, strict=True), strict=True):
            column[: len(rows)] = values

    def chosen(self, count: int) -> list[int]:
        """The first `count` tokens."""
        return self._chosen[:count].tolist()


def _offsets(counts: list[int]) -> list[int]:
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return offsets
