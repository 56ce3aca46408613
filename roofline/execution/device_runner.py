"""One rank's half of a step on a device that runs ahead: steps are submitted, results collected.

The host writes what a step is told into one pinned buffer and copies it; the device finds tokens
the host has not seen in `last_token`, and sends back tokens and one flag. Nothing waits for the
device but `collect`, and a step in which a request wants more than a draw.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from roofline.execution.arena import Arena
from roofline.execution.device_program import (
    CapturedProgram,
    DeviceProgram,
    padded_sizes,
    view,
)
from roofline.execution.inputs import Choice, Entry, InputTables
from roofline.execution.sampling import OFF, RowSampler, logprobs_of, not_finite
from roofline.models.decoder import Decoder, rope_table
from roofline.ops import KvCache, Ops
from roofline.ops.cuda import Graphs, Lane, on
from roofline.request import TokenLogprobs
from roofline.scheduling.plan import NONE, ON_DEVICE, StepPlan, StepResult
from roofline.upload import Layout, upload_bytes, upload_layout

MAX_IN_FLIGHT = 2
# Of steps that meet every kernel: launchers change tiles between these, and Triton compiles anew
# for a size of one and for multiples of 16.
WARM_UP_TOKENS = (1, 2, 16, 24, 32, 40, 64, 72, 128, 300, 512)


@dataclass
class _Pending:
    """A step that was submitted: whose tokens come, and where."""

    plan: StepPlan
    asking: list[Entry]
    samplers: list[RowSampler]  # of those, as they were then
    lane: Lane
    raw: dict[int, Tensor]  # entry -> logits [V] of a token whose logprobs are asked for
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    tokens: list[int] | None = None

    def wait(self) -> list[int]:
        """The tokens, one for each that asks; each sampler is told of its own, once."""
        if self.tokens is None:
            self.lane.wait()
            self.tokens = self.lane.result[1 : 1 + len(self.asking)].tolist()
            for sampler, token in zip(self.samplers, self.tokens, strict=True):
                sampler.take(token)
        return self.tokens

    @property
    def is_finite(self) -> bool:
        """Whether the logits were; after `wait`."""
        return not self.asking or bool(self.lane.result[0])


class DeviceRunner:
    """Runs plans on one rank's decoder, cache and arena, of any device; one thread at a time."""

    def __init__(
        self,
        decoder: Decoder,
        ops: Ops,
        kv_cache: KvCache,
        arena: Arena,
        *,
        graphs: Graphs | None,  # None: op by op
    ) -> None:
        self._parts = decoder, ops, kv_cache, arena
        self._ops, self._arena = ops, arena
        self.device = arena["upload"].device
        self._rows = len(arena["last_token"]) - 1
        self._tables = UploadTables(arena, kv_cache.block_tokens)
        self._samplers: list[RowSampler | None] = [None] * self._rows
        self._lanes = deque(
            Lane(len(arena["upload"]), len(arena["result"]), self.device)
            for _ in range(MAX_IN_FLIGHT)
        )
        self._pending: deque[_Pending] = deque()
        self._graphs = graphs
        self._sizes = padded_sizes(self._rows) if graphs is not None else []
        self._captured: dict[int, CapturedProgram] = {}
        rope_table(decoder.config, arena["rope"].shape[1], out=arena["rope"])

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int], None]) -> None:
        """Run steps of padding alone, so that kernels are compiled before a request waits for them.

        `progress` is told the tokens of each step.
        """
        most, lane = len(self._arena["residual"]), self._lanes[0]
        with on(self.device):
            for tokens in (size for size in WARM_UP_TOKENS if size <= most):
                progress(tokens)
                sampled = min(tokens, self._rows)
                layout = upload_layout(tokens, sampled, self._rows, 0)
                self._tables.write(lane.upload, layout, 0, [])
                lane.send(upload_bytes(layout), self._arena["upload"])
                for longest in {1, tokens}:
                    program = self._program(tokens, sampled, longest)
                    program.compute()
                    for truncates in (False, True):
                        program.choose(truncates)
                lane.fetch(self._arena["result"])
                lane.wait()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        """Start a step."""
        assert len(self._pending) < MAX_IN_FLIGHT, "collect a step before the next one"
        for start in plan.starts:
            self._samplers[start.row] = RowSampler(start)
        with on(self.device):
            self._lanes.rotate()
            self._pending.append(self._start(plan, self._lanes[0]))

    @torch.inference_mode()
    def collect(self) -> StepResult:
        """Wait for the oldest step submitted."""
        step = self._pending.popleft()
        with on(self.device):
            tokens = step.wait()
        if not step.is_finite:
            raise not_finite()
        chosen = {entry.index: token for entry, token in zip(step.asking, tokens, strict=True)}
        logprobs = {}
        for entry, sampler in zip(step.asking, step.samplers, strict=True):
            if entry.index in step.raw:
                row, count = step.raw[entry.index].cpu(), sampler.params.logprobs
                logprobs[entry.index] = [logprobs_of(row, chosen[entry.index], count)]
        samples = step.plan.samples
        return StepResult(
            counts=samples,
            token_ids=[chosen[i] for i, count in enumerate(samples) if count],
            logprobs=logprobs,
            prompt_logprobs=step.prompt_logprobs,
        )

    def reset(self) -> None:
        """Drop the steps that were not collected, once the device is done with them."""
        while self._pending:
            self._pending.popleft().lane.wait()

    def _start(self, plan: StepPlan, lane: Lane) -> _Pending:
        tokens, entries = self._tables.fill(plan)
        asking = [entry for entry in entries if entry.samples]
        samplers = [self._sampler(entry.row) for entry in asking]
        free = [_is_free(s, plan.masks[e.index]) for e, s in zip(asking, samplers, strict=True)]
        self._tables.sample(asking, samplers, free)
        is_decode = len(asking) == tokens  # a token of every row, and all are sampled
        size = next((size for size in self._sizes if is_decode and size >= tokens), None)
        shape = (size, size) if size else (tokens, len(asking))
        layout = upload_layout(*shape, self._rows, self._tables.num_new_blocks)
        self._tables.write(lane.upload, layout, tokens, entries)
        lane.send(upload_bytes(layout), self._arena["upload"])
        self._extend_block_table(layout)
        longest = max(entry.count for entry in entries)
        program = self._captured_program(size) if size else self._program(*shape, longest)
        step = program.program if isinstance(program, CapturedProgram) else program
        program.compute()
        pending = _Pending(plan, asking, samplers, lane, {}, {})
        if asking:
            self._prepare(pending, step)
            program.choose(any(sampler.limits != OFF for sampler in samplers))
        lane.fetch(self._arena["result"][: 1 + len(asking)])
        asked = [entry for entry in entries if self._prompt_logprobs(entry.row) != NONE]
        pending.prompt_logprobs = {e.index: self._score_prompt(e, step) for e in asked}
        return pending

    def _prepare(self, pending: _Pending, program: DeviceProgram) -> None:
        """Keep logits whose logprobs are asked for; apply what a request wants beyond a draw."""
        plan = pending.plan
        for place, (entry, sampler) in enumerate(
            zip(pending.asking, pending.samplers, strict=True)
        ):
            slot = plan.masks[entry.index]
            if sampler.params.logprobs != NONE:
                pending.raw[entry.index] = program.logits[place].clone()
            if _is_free(sampler, slot):
                continue
            for earlier in self._pending:  # its last token may be needed
                earlier.wait()
            row = program.logits[place].cpu()
            mask = None if slot == NONE else plan.mask_bits[slot]
            temperature = sampler.prepare(row, entry.position + entry.count, mask)
            program.logits[place].copy_(row)
            program.fields["temperature"][place].fill_(temperature)

    def _extend_block_table(self, layout: Layout) -> None:
        if self._tables.num_new_blocks:
            places, blocks = (
                view(self._arena["upload"], *layout[n]) for n in ("block_places", "block_ids")
            )
            self._arena["block_table"].view(-1).index_copy_(0, places, blocks)

    def _program(self, tokens: int, sampled: int, longest: int) -> DeviceProgram:
        return DeviceProgram(*self._parts, tokens, sampled, longest)

    def _captured_program(self, size: int) -> CapturedProgram:
        if size not in self._captured:
            assert self._graphs is not None
            self._captured[size] = CapturedProgram(self._program(size, size, 1), self._graphs)
        return self._captured[size]

    def _prompt_logprobs(self, row: int) -> int:
        return self._sampler(row).params.prompt_logprobs

    def _score_prompt(self, entry: Entry, program: DeviceProgram) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt tokens after this entry's, the head run in slices."""
        sampler = self._sampler(entry.row)
        last = min(entry.position + entry.count, sampler.params.num_prompt - 1)
        scored: list[TokenLogprobs] = []
        whole = self._arena["logits"]
        for first in range(entry.position, last, len(whole)):
            positions = range(first, min(first + len(whole), last))
            tokens = [entry.first_token + p - entry.position for p in positions]
            logits = whole[: len(tokens)]
            program.head(torch.tensor(tokens, device=self.device), logits)
            if not self._ops.all_finite(logits):
                raise not_finite()
            for position, row in zip(positions, logits.cpu(), strict=True):
                target = sampler.history[position + 1]
                scored.append(logprobs_of(row, target, sampler.params.prompt_logprobs))
        return scored

    def _sampler(self, row: int) -> RowSampler:
        sampler = self._samplers[row]
        assert sampler is not None, "a row is started before it is used"
        return sampler


class UploadTables(InputTables):
    """The tables of a step as the host keeps them, and what of them is uploaded."""

    def __init__(self, arena: Arena, block_size: int) -> None:
        rows, width = arena["block_table"].shape
        tokens, sampled = len(arena["residual"]), len(arena["result"]) - 1
        layout = upload_layout(tokens, sampled, rows, 0)
        host = {
            name: torch.zeros(count, dtype=getattr(torch, dtype))
            for name, (_, count, dtype) in layout.items()
        }
        host["block_table"] = torch.zeros(rows, width, dtype=torch.int32)
        host["chosen"] = torch.zeros(sampled, dtype=torch.int64)
        host["last_token"] = torch.full((rows,), ON_DEVICE)  # looked up there
        self._host = {name: tensor.numpy() for name, tensor in host.items()}
        self._new_blocks: list[tuple[int, int]] = []  # place in the flat table, block
        self._width = width
        super().__init__(host, block_size)

    @property
    def num_new_blocks(self) -> int:
        """Entries of the block table that the last `fill` changed."""
        return len(self._new_blocks)

    def fill(self, plan: StepPlan) -> tuple[int, list[Entry]]:
        """See `InputTables`."""
        self._new_blocks.clear()
        return super().fill(plan)

    def sample(
        self, asking: Sequence[Entry], samplers: Sequence[RowSampler], free: Sequence[bool]
    ) -> None:
        """Say which tokens are sampled, and how: what is not `free` the host will divide itself."""
        choices: list[Choice] = []
        for place, (entry, sampler) in enumerate(zip(asking, samplers, strict=True)):
            heat, position = sampler.params.temperature, entry.position + entry.count
            self._host["sampled"][place] = entry.first_token + entry.count - 1
            self._host["choice_rows"][place] = entry.row
            divides = free[place] and sampler.limits != OFF
            self._host["divisor"][place] = heat if divides else 1.0
            heat = 1.0 if divides else heat
            choices.append(Choice(*sampler.limits, heat, sampler.signed_seed, position))
        if choices:
            self.choices.set(choices)

    def write(self, upload: Tensor, layout: Layout, tokens: int, entries: Sequence[Entry]) -> None:
        """Write a step of so many tokens into an upload, padded beyond those and its samples."""
        sampled = sum(entry.samples for entry in entries)
        for entry in entries:
            part = slice(entry.first_token, entry.first_token + entry.count)
            self._host["token_rows"][part] = entry.row
        whole = upload.numpy()
        for name, (start, count, dtype) in layout.items():
            target = whole[start : start + count * np.dtype(dtype).itemsize].view(dtype)
            if name == "block_places":
                target[:] = [place for place, _ in self._new_blocks]
            elif name == "block_ids":
                target[:] = [block for _, block in self._new_blocks]
            else:
                target[:] = self._host[name][:count]
                used = {"query_start": count, "context_len": count}.get(
                    name, tokens if name in _OF_TOKENS else sampled
                )
                target[used:] = _PADDING.get(name, 0)
                if name in ("token_rows", "choice_rows"):
                    target[used:] = len(self._host["context_len"])  # nobody's row

    def _extend_table(self, row: int, blocks: list[int]) -> None:
        first = row * self._width + self._held[row]
        self._new_blocks += zip(range(first, first + len(blocks)), blocks, strict=True)
        super()._extend_table(row, blocks)


_OF_TOKENS = ("token_ids", "token_rows", "positions", "slots")
_PADDING = {"slots": -1, "divisor": 1, "top_p": 1}  # of a token of nobody; else 0


def _is_free(sampler: RowSampler, mask_slot: int) -> bool:
    """Whether a row's logits reach `Ops.truncate` and `Ops.choose` without the host."""
    return sampler.is_free and mask_slot == NONE
