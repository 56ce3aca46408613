"""One rank's half of a step: fill the tables, run the decoder, sample. Every rank runs this."""

import torch
from torch import Tensor

from roofline.execution.arena import Arena
from roofline.execution.graphs import EagerProgram, capture
from roofline.execution.inputs import Choice, Entry, InputTables
from roofline.execution.sampling import RowSampler, logprobs_of, not_finite
from roofline.models.decoder import Decoder, rope_table
from roofline.ops import KvCache, Ops
from roofline.request import TokenLogprobs
from roofline.scheduling.plan import NONE, StepPlan, StepResult


class ModelRunner:
    """Runs plans on one rank's decoder, KV pool and arena."""

    def __init__(
        self, decoder: Decoder, ops: Ops, kv_cache: KvCache, arena: Arena, *, eager: bool = False
    ) -> None:
        self._ops, self._arena = ops, arena
        self._tables = InputTables(arena, kv_cache.block_tokens)
        self._sampled = arena["sampled"].numpy()
        self._samplers: list[RowSampler | None] = [None] * arena["last_token"].shape[0]
        rope_table(decoder.config, arena["rope"].shape[1], out=arena["rope"])
        program = EagerProgram(decoder, ops, kv_cache, arena)
        self._program = program if eager else capture(program)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan's tokens and sample where it says so."""
        for start in plan.starts:
            self._samplers[start.row] = RowSampler(start)
        tokens, entries = self._tables.fill(plan)
        asking = [entry for entry in entries if entry.samples]
        logprobs: dict[int, list[TokenLogprobs]] = {}
        if asking and all(self._is_plain(plan, entry) for entry in asking):
            chosen = self._run_through(tokens, asking)
        else:
            self._program.forward(tokens)
            chosen, logprobs = self._sample(plan, asking) if asking else ({}, {})
        asked = [entry for entry in entries if self._prompt_logprobs(entry.row) != NONE]
        return StepResult(
            counts=plan.samples,
            token_ids=[chosen[i] for i, count in enumerate(plan.samples) if count],
            logprobs=logprobs,
            prompt_logprobs={entry.index: self._score_prompt(entry) for entry in asked},
        )

    def _is_plain(self, plan: StepPlan, entry: Entry) -> bool:
        """Whether nothing happens to an entry's logits before its token is chosen."""
        return self._sampler(entry.row).is_plain and plan.masks[entry.index] == NONE

    def _run_through(self, tokens: int, asking: list[Entry]) -> dict[int, int]:
        """Forward, head and choice as one; a token for each entry."""
        samplers = [self._sampler(entry.row) for entry in asking]
        self._set_sampled([entry.first_token + entry.count - 1 for entry in asking])
        self._tables.choices.set(
            [
                _choice(sampler, sampler.params.temperature, entry.position + entry.count)
                for sampler, entry in zip(samplers, asking, strict=True)
            ]
        )
        if not self._program.run(tokens, len(asking)):
            raise not_finite()
        return self._take(asking)

    def _sample(
        self, plan: StepPlan, asking: list[Entry]
    ) -> tuple[dict[int, int], dict[int, list[TokenLogprobs]]]:
        """One token for every entry that asks, kept for the row's next step; and its logprobs."""
        logits = self._logits([e.first_token + e.count - 1 for e in asking])
        choices, raw = list[Choice](), dict[int, Tensor]()
        for entry, row_logits in zip(asking, logits, strict=True):
            sampler, slot = self._sampler(entry.row), plan.masks[entry.index]
            if sampler.params.logprobs != NONE:
                raw[entry.index] = row_logits.clone()
            mask = None if slot == NONE else plan.mask_bits[slot]
            position = entry.position + entry.count
            temperature = sampler.prepare(row_logits, position, mask)
            choices.append(_choice(sampler, temperature, position))
        self._tables.choices.set(choices)
        self._program.choose(len(asking))
        tokens = self._take(asking)
        wanted = {entry.index: self._sampler(entry.row).params.logprobs for entry in asking}
        logprobs = {i: [logprobs_of(raw[i], tokens[i], wanted[i])] for i in raw}
        return tokens, logprobs

    def _take(self, asking: list[Entry]) -> dict[int, int]:
        """The tokens chosen, by entry; each is its row's last."""
        tokens: dict[int, int] = {}
        choices = self._tables.choices
        for entry, token in zip(asking, choices.chosen(len(asking)), strict=True):
            self._sampler(entry.row).take(token)
            tokens[entry.index] = token
            choices.last_token[entry.row] = token
        return tokens

    def _prompt_logprobs(self, row: int) -> int:
        return self._sampler(row).params.prompt_logprobs

    def _score_prompt(self, entry: Entry) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt tokens after this entry's, the head run in slices."""
        sampler = self._sampler(entry.row)
        last = min(entry.position + entry.count, sampler.params.num_prompt - 1)
        scored: list[TokenLogprobs] = []
        step = self._arena["logits"].shape[0]
        for first in range(entry.position, last, step):
            positions = range(first, min(first + step, last))
            tokens = [entry.first_token + p - entry.position for p in positions]
            for position, logits in zip(positions, self._logits(tokens), strict=True):
                target = sampler.history[position + 1]
                scored.append(logprobs_of(logits, target, sampler.params.prompt_logprobs))
        return scored

    def _logits(self, tokens: list[int]) -> Tensor:
        """Logits [S, V] at some tokens of the step, in the arena."""
        count = len(tokens)
        self._set_sampled(tokens)
        self._program.head(count)
        logits = self._arena["logits"][:count]
        if not self._ops.all_finite(logits):
            raise not_finite()
        return logits

    def _set_sampled(self, tokens: list[int]) -> None:
        """Say which tokens of the step the head is run on."""
        self._sampled[: len(tokens)] = tokens

    def _sampler(self, row: int) -> RowSampler:
        sampler = self._samplers[row]
        assert sampler is not None, "a row is started before it is used"
        return sampler


def _choice(sampler: RowSampler, temperature: float, position: int) -> Choice:
    return Choice(*sampler.limits, temperature, sampler.signed_seed, position)
