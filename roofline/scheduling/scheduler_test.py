import random
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from roofline.errors import CapacityError, RequestError
from roofline.request import Request, SamplingParams, TokenLogprobs, TokenOutput, child_seed
from roofline.scheduling.limits import SchedulerConfig
from roofline.scheduling.plan import NONE, ON_DEVICE, RowStart, StepPlan, StepResult
from roofline.scheduling.scheduler import Scheduler

VOCAB = 64
EOS = 3


def token_at(seed: int, index: int, masked: Sequence[int] = ()) -> int:
    """The token a request samples for position `index`: no other request's, no other place's."""
    token = child_seed(seed, index) % VOCAB
    while token in masked:
        token = (token + 1) % VOCAB
    return token


class FakeGrammar:
    """A matcher whose masks depend on all tokens so far; it ends, or gives up, after `length`."""

    def __init__(self, length: int, gives_up: bool = False) -> None:
        self.left, self.gives_up, self.state = length, gives_up, 1

    def forbidden(self) -> list[int]:
        return [token for token in range(VOCAB) if (token + self.state) % 3 == 0]

    def mask(self) -> bytes:
        return (2**VOCAB - 1 - sum(1 << token for token in self.forbidden())).to_bytes(8, "little")

    def accept(self, token: int) -> bool:
        assert token not in self.forbidden(), "a token was sampled that the mask forbids"
        self.state = hash((self.state, token))
        self.left -= 1
        if self.gives_up and self.left == 0:
            raise RequestError("too complex")
        return self.left == 0


class KvWorkers:
    """Workers with a pool of KV slots and no model; a token is a hash of (seed, position).

    A slot holds what attention would see there: a digest of all tokens up to its position. Before
    a token is sampled, its whole context is read through the row's block table and compared with
    the request's own, so a block shared, evicted or given away too early is seen at once.
    """

    def __init__(self, config: SchedulerConfig, max_in_flight: int = 1) -> None:
        self.max_in_flight = max_in_flight
        self.block_tokens = config.block_tokens
        self.kv: dict[tuple[int, int], int] = {}  # (block, slot) -> digest
        self.contexts: dict[int, list[int]] = {}  # by seed: the prompt, then what was sampled
        self.digests: dict[int, list[int]] = {}  # by seed: of each prefix of the context
        self.starts: dict[int, RowStart] = {}
        self.tables: dict[int, list[int]] = {}
        self.sampled: dict[int, int] = {}  # by row: position of its last sampled token
        self.plans: deque[StepPlan] = deque()
        self.closed = False

    def expect(self, request: Request) -> Request:
        """Note the prompt of a request that will come."""
        self.contexts[request.seed] = list(request.tokens)
        self.digests[request.seed] = []
        return request

    def submit(self, plan: StepPlan) -> None:
        assert len(self.plans) < self.max_in_flight
        self.plans.append(StepPlan.decode(plan.encode()))

    def reset(self) -> None:
        self.plans.clear()

    def collect(self) -> StepResult:
        plan = self.plans.popleft()
        for start in plan.starts:
            self.starts[start.row] = start
            self.tables[start.row] = list[int]()
            self.sampled.pop(start.row, None)
            known = self.contexts[start.seed]
            assert not start.history or known[: len(start.history)] == list(start.history)
        entries = list(split(plan))
        for entry in entries:
            self.write(*entry[:4])
        result = StepResult([], [])
        for index, (row, position, tokens, _, samples) in enumerate(entries):
            last = position + len(tokens) - 1
            self.read(row, last)
            result.counts.append(samples)
            if samples:
                slot = plan.masks[index]
                mask = None if slot == NONE else plan.mask_bits[slot]
                result.token_ids.append(self.sample(row, last + 1, result, index, mask))
            self.give_prompt_logprobs(row, position, last, result, index)
        return result

    def close(self) -> None:
        self.closed = True

    def write(self, row: int, position: int, tokens: list[int], blocks: list[int]) -> None:
        context = self.contexts[self.starts[row].seed]
        table = self.tables[row]
        table += blocks
        assert len(set(table)) == len(table), f"a block twice in the table of row {row}"
        assert len(table) == -(-(position + len(tokens)) // self.block_tokens)
        for offset, token in enumerate(tokens, position):
            if token == ON_DEVICE:
                assert self.sampled[row] == offset, "its last sampled token belongs elsewhere"
            else:
                assert context[offset] == token, f"row {row} is given another's token at {offset}"
            self.kv[self.slot(row, offset)] = self.digest(row, offset)

    def read(self, row: int, last: int) -> None:
        for offset in range(last + 1):
            found = self.kv.get(self.slot(row, offset))
            assert found == self.digest(row, offset), f"row {row} reads another's KV at {offset}"

    def sample(
        self, row: int, index: int, result: StepResult, entry: int, mask: bytes | None
    ) -> int:
        start = self.starts[row]
        context = self.contexts[start.seed]
        early = index - start.num_prompt < start.min_tokens
        bits = 2**VOCAB - 1 if mask is None else int.from_bytes(mask, "little")
        forbidden = [token for token in range(VOCAB) if not bits >> token & 1]
        token = token_at(start.seed, index, [*forbidden, *(start.stop_ids if early else ())])
        if index == len(context):
            context.append(token)
        assert context[index] == token, "a token sampled again is another"
        self.sampled[row] = index
        if start.logprobs >= 0:
            result.logprobs[entry] = [TokenLogprobs(token, -float(index), 1, ())]
        return token

    def give_prompt_logprobs(
        self, row: int, first: int, last: int, result: StepResult, entry: int
    ) -> None:
        start = self.starts[row]
        targets = range(first + 1, min(last + 2, start.num_prompt))
        if start.prompt_logprobs >= 0 and targets:
            result.prompt_logprobs[entry] = [
                TokenLogprobs(start.history[index], -float(index), 1, ()) for index in targets
            ]

    def slot(self, row: int, offset: int) -> tuple[int, int]:
        return self.tables[row][offset // self.block_tokens], offset % self.block_tokens

    def digest(self, row: int, offset: int) -> int:
        seed = self.starts[row].seed
        digests, context = self.digests[seed], self.contexts[seed]
        while len(digests) <= offset:
            before = digests[-1] if digests else 0
            digests.append(hash((before, context[len(digests)])))
        return digests[offset]


def split(plan: StepPlan) -> list[tuple[int, int, list[int], list[int], int]]:
    """The plan's entries: row, position, token ids, new block ids, samples."""
    tokens, blocks = iter(plan.token_ids), iter(plan.block_ids)
    return [
        (row, position, [next(tokens) for _ in range(n)], [next(blocks) for _ in range(b)], samples)
        for row, position, n, b, samples in zip(
            plan.rows, plan.positions, plan.counts, plan.block_counts, plan.samples, strict=True
        )
    ]


def answer(
    request: Request,
    config: SchedulerConfig,
    prompt: Sequence[int],
    grammar: FakeGrammar | None = None,
) -> tuple[list[int], str]:
    """What a request must answer, whatever else runs: its tokens and why it ends."""
    sampling, output = request.sampling, list[int]()
    limit = config.max_model_len - len(prompt)
    limit = limit if sampling.max_tokens is None else min(limit, sampling.max_tokens)
    while True:
        early = len(output) < sampling.min_tokens
        masked = sorted(request.stop_ids) if early else list[int]()
        masked += grammar.forbidden() if grammar else []
        output.append(token_at(request.seed, len(prompt) + len(output), masked))
        if output[-1] in request.stop_ids and not early:
            return output, "stop"
        if grammar and grammar.left == 1:
            return output, "error" if grammar.gives_up else "stop"
        if grammar:
            grammar.accept(output[-1])
        if len(output) == limit:
            return output, "length"


class Run:
    """A scheduler, its workers, and everything its requests were given."""

    def __init__(self, config: SchedulerConfig, max_in_flight: int = 1) -> None:
        self.config = config
        self.scheduler = Scheduler(config, secret=b"the same every time")
        self.workers = KvWorkers(config, max_in_flight)
        self.plans: deque[StepPlan] = deque()
        self.requests: dict[str, tuple[Request, list[int]]] = {}
        self.grammars: dict[str, tuple[int, bool]] = {}
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.aborted: set[str] = set()
        self.trace: list[StepPlan] = []

    def add(
        self,
        prompt: Sequence[int],
        priority: int = 0,
        grammar: tuple[int, bool] | None = None,
        **options: Any,
    ) -> str:
        index = len(self.requests)
        sampling = SamplingParams(**options)
        request = Request(
            f"r{index}",
            prompt,
            sampling,
            seed=index,
            eos_token_ids=[EOS],
            priority=priority,
            matcher=FakeGrammar(*grammar) if grammar else None,
        )
        if grammar:
            self.grammars[request.request_id] = grammar
        self.scheduler.add(self.workers.expect(request))
        self.requests[request.request_id] = request, list(prompt)
        self.outputs[request.request_id] = []
        return request.request_id

    def abort(self, request_id: str) -> None:
        if self.scheduler.abort(request_id):
            self.aborted.add(request_id)

    def step(self) -> None:
        """Fill the pipeline and collect the oldest step, as the engine does."""
        while len(self.plans) < self.workers.max_in_flight:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            assert len(plan.token_ids) <= self.config.max_num_batched_tokens
            assert max(plan.counts) <= (self.config.prefill_chunk_tokens or len(plan.token_ids))
            self.workers.submit(plan)
            self.plans.append(plan)
            self.trace.append(plan)
        assert self.plans, "nothing is planned though requests are alive"
        for output in self.scheduler.update(self.plans.popleft(), self.workers.collect()):
            assert output.request_id not in self.aborted, "an aborted request is answered"
            self.outputs[output.request_id].append(output)

    def finish(self) -> None:
        """Run to the end, then compare every answer with the one it must be."""
        for _ in range(20_000):
            if not (self.scheduler.has_unfinished or self.plans):
                break
            self.step()
            self.scheduler.check()
        assert not self.scheduler.has_unfinished, "requests starve"
        for request_id, (request, prompt) in self.requests.items():
            self.compare(request_id, request, prompt)
        stats = self.scheduler.stats()
        assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)

    def compare(self, request_id: str, request: Request, prompt: list[int]) -> None:
        outputs = self.outputs[request_id]
        grammar = self.grammars.get(request_id)
        follows = FakeGrammar(*grammar) if grammar else None
        tokens, reason = answer(request, self.config, prompt, follows)
        got = [token for output in outputs for token in output.token_ids]
        if request_id in self.aborted:
            assert got == tokens[: len(got)]
            assert all(output.finish_reason is None for output in outputs)
            return
        assert got == tokens
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert outputs[-1].finish_reason == request.finish_reason == reason
        assert request.matcher is None, "a finished request keeps its matcher"
        assert {output.num_prompt_tokens for output in outputs} == {len(prompt)}
        if request.sampling.logprobs is not None:
            self.compare_logprobs(outputs, len(prompt))
        if request.sampling.prompt_logprobs is not None:
            given = [output.prompt_logprobs for output in outputs]
            assert given[1:] == [None] * (len(outputs) - 1)
            wanted = [TokenLogprobs(prompt[i], -float(i), 1, ()) for i in range(1, len(prompt))]
            assert given[0] == wanted

    def compare_logprobs(self, outputs: list[TokenOutput], num_prompt: int) -> None:
        position = num_prompt
        for output in outputs:
            assert output.logprobs is not None
            for token, entry in zip(output.token_ids, output.logprobs, strict=True):
                assert (entry.token_id, entry.logprob) == (token, -float(position))
                position += 1


def config_of(**sizes: Any) -> SchedulerConfig:
    defaults: dict[str, Any] = {
        "num_blocks": 24,
        "block_tokens": 4,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "vocab_size": VOCAB,
    }
    return SchedulerConfig(**{**defaults, **sizes})


def some_prompt(chance: random.Random, longest: int = 40) -> list[int]:
    """A prompt that shares a prefix of any length with many others."""
    base = [5 + chance.randrange(2)] * chance.randint(0, longest - 1)
    return base + [chance.randrange(VOCAB) for _ in range(chance.randint(1, longest - len(base)))]


def some_options(chance: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {"priority": chance.choice((0, 0, 0, -1, 1))}
    options["max_tokens"] = chance.choice((None, 1, 2, 8, 30))
    if chance.random() < 0.2:
        options["min_tokens"] = chance.randint(0, options["max_tokens"] or 10)
    if chance.random() < 0.2:
        options["logprobs"] = 0
    if chance.random() < 0.2:
        options["prompt_logprobs"] = 0
    if chance.random() < 0.3:
        options["repetition_penalty"] = 1.5
    if chance.random() < 0.3:
        options["ignore_eos"] = True
    if chance.random() < 0.3:
        options["stop_token_ids"] = [7, 11]
    if chance.random() < 0.3:
        options["grammar"] = chance.choice((1, 2, 9, 40)), chance.random() < 0.3
    return options


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of all kinds are added, aborted and stepped in any order, on any sizes."""

    @initialize(
        max_in_flight=st.integers(1, 3),
        chunk=st.sampled_from([None, 1, 7, 64]),
        num_blocks=st.integers(16, 28),
        rows=st.integers(1, 6),
        budget=st.sampled_from([6, 16, 64]),
        caching=st.booleans(),
    )
    def begin(
        self,
        max_in_flight: int,
        chunk: int | None,
        num_blocks: int,
        rows: int,
        budget: int,
        caching: bool,
    ) -> None:
        sizes = config_of(
            num_blocks=num_blocks,
            max_num_seqs=rows,
            max_num_batched_tokens=budget,
            prefill_chunk_tokens=chunk,
            enable_prefix_caching=caching,
        )
        self.run = Run(sizes, max_in_flight)

    @rule(seed=st.integers(0, 2**32))
    def add(self, seed: int) -> None:
        chance = random.Random(seed)
        self.run.add(some_prompt(chance), **some_options(chance))

    @precondition(lambda self: self.run.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.run.abort(data.draw(st.sampled_from(sorted(self.run.requests))))

    @precondition(lambda self: self.run.scheduler.has_unfinished or self.run.plans)
    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            if self.run.scheduler.has_unfinished or self.run.plans:
                self.run.step()

    @invariant()
    def everything_is_accounted_for(self) -> None:
        self.run.scheduler.check()

    def teardown(self) -> None:
        if "run" in vars(self):
            self.run.finish()


TestSchedulerUnderRandomEvents = SchedulerMachine.TestCase
TestSchedulerUnderRandomEvents.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_answer_is_right_through_a_thousand_random_events(
    max_in_flight: int, chunk: int
) -> None:
    chance = random.Random(100 * max_in_flight + chunk)
    budget = 16 if chunk == 7 else 64
    sizes = config_of(prefill_chunk_tokens=chunk, max_num_batched_tokens=budget)
    run = Run(sizes, max_in_flight)
    for _ in range(1200):
        event = chance.random()
        if event < 0.15:
            run.add(some_prompt(chance), **some_options(chance))
        elif event < 0.2 and run.requests:
            run.abort(chance.choice(list(run.requests)[-8:]))
        elif run.scheduler.has_unfinished or run.plans:
            run.step()
        run.scheduler.check()
    run.finish()
    stats = run.scheduler.stats()
    # A walk that never came to these proves nothing about them.
    assert stats.num_preemptions > 10
    assert stats.prompt_tokens_cached > 100
    assert len(run.aborted) > 10


def test_the_same_events_give_the_same_plans_whatever_the_secret() -> None:
    def trace(secret: bytes) -> list[StepPlan]:
        chance = random.Random(5)
        run = Run(config_of())
        run.scheduler = Scheduler(run.config, secret)
        for _ in range(40):
            run.add(some_prompt(chance), **some_options(chance))
            run.step()
        run.finish()
        return run.trace

    assert trace(b"one") == trace(b"another")


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_preemption_changes_no_token(max_in_flight: int) -> None:
    run = Run(config_of(num_blocks=16), max_in_flight)
    for _ in range(5):
        run.add([9] * 10, ignore_eos=True, max_tokens=40, repetition_penalty=1.2)
    run.finish()
    assert run.scheduler.stats().num_preemptions > 0


def test_the_last_to_come_with_the_highest_priority_number_is_preempted_first() -> None:
    run = Run(config_of(num_blocks=16, enable_prefix_caching=False))
    urgent = run.add([1] * 20, priority=0, ignore_eos=True)
    late_urgent = run.add([2] * 20, priority=0, ignore_eos=True)
    patient = run.add([4] * 20, priority=5, ignore_eos=True)
    while not run.scheduler.stats().num_preemptions:
        run.step()
    rows = {request_id: run.requests[request_id][0].row for request_id in run.requests}
    assert rows[patient] == -1
    assert rows[urgent] >= 0 and rows[late_urgent] >= 0
    run.finish()


def test_lower_priority_numbers_are_admitted_first_and_then_the_earlier_arrival() -> None:
    run = Run(config_of(max_num_seqs=1))
    names = [run.add([1], priority=p, max_tokens=1) for p in (5, 0, 5, -1, 0)]
    order: list[str] = []
    while run.scheduler.has_unfinished:
        before = {name for name, outputs in run.outputs.items() if outputs}
        run.step()
        order += [name for name in names if run.outputs[name] and name not in before]
    assert order == [names[index] for index in (3, 1, 4, 0, 2)]


def test_a_running_request_is_never_put_back_for_a_more_urgent_newcomer() -> None:
    run = Run(config_of(max_num_seqs=1))
    first = run.add([1], priority=5, ignore_eos=True, max_tokens=4)
    run.step()
    urgent = run.add([2], priority=-5, max_tokens=1)
    while not run.outputs[urgent]:
        run.step()
    assert run.outputs[first][-1].finish_reason == "length"
    assert run.scheduler.stats().num_preemptions == 0


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    run = Run(config_of(prefill_chunk_tokens=7))
    short = run.add([1], ignore_eos=True, max_tokens=20)
    run.step()
    long = run.add([2] * 30, max_tokens=1)
    for chunk in (7, 7, 7, 7, 2):
        assert not run.outputs[long]
        run.step()
        assert run.trace[-1].counts == [1, chunk]
        assert run.trace[-1].samples == [1, int(chunk == 2)]
    assert len(run.outputs[short]) == 6
    assert run.outputs[long][-1].finish_reason == "length"


def test_the_budget_of_a_step_is_never_exceeded_and_never_left_over() -> None:
    run = Run(config_of(max_num_batched_tokens=16, enable_prefix_caching=False))
    for value in range(1, 5):
        run.add([value] * 10, max_tokens=1)
    run.step()
    run.step()
    assert [plan.counts for plan in run.trace] == [[10, 6], [4, 10, 2]]
    run.finish()


def test_a_more_urgent_prompt_takes_the_whole_step_and_decoding_waits() -> None:
    run = Run(config_of(max_num_batched_tokens=16))
    run.add([1], priority=5, ignore_eos=True, max_tokens=4)
    run.step()
    run.add([2] * 40, priority=0, max_tokens=1)
    for _ in range(3):
        run.step()
    assert [plan.counts for plan in run.trace] == [[1], [1, 15], [16], [9, 1]]
    run.finish()


def test_rows_are_reused_lowest_first() -> None:
    run = Run(config_of(max_num_seqs=3))
    names = [run.add([1, index], ignore_eos=True) for index in range(3)]
    run.step()
    for name in (names[2], names[0]):
        run.abort(name)
    newcomer = run.add([9], ignore_eos=True)
    run.step()
    assert run.requests[newcomer][0].row == 0
    run.finish()


def test_children_added_together_compute_their_prompt_once() -> None:
    run = Run(config_of())
    for _ in range(3):
        run.add([1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=3, ignore_eos=True)
    run.step()
    assert run.trace[0].counts == [9, 1, 1]
    run.finish()
    assert [run.outputs[f"r{index}"][0].num_cached_tokens for index in range(3)] == [0, 8, 8]


def test_a_prompt_wholly_in_the_cache_still_computes_its_last_token() -> None:
    run = Run(config_of())
    first = run.add([1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1)
    run.finish()
    again = run.add([1, 2, 3, 4, 5, 6, 7, 8], max_tokens=1)
    run.finish()
    assert run.outputs[first][0].num_cached_tokens == 0
    assert run.outputs[again][0].num_cached_tokens == 4
    assert run.trace[-1].counts == [4]


def test_an_answer_is_found_in_the_cache_by_the_next_turn() -> None:
    run = Run(config_of())
    run.add([1, 2, 3], max_tokens=10, ignore_eos=True)
    run.finish()
    request, _ = run.requests["r0"]
    turn = run.add([*request.tokens, 5], max_tokens=1)
    run.finish()
    assert run.outputs[turn][0].num_cached_tokens == 12  # 13 were known, the last was not computed


def test_prompt_logprobs_read_nothing_from_the_cache() -> None:
    run = Run(config_of(prefill_chunk_tokens=7))
    run.add([4] * 20, max_tokens=1)
    run.finish()
    asks = run.add([4] * 20, max_tokens=4, prompt_logprobs=0)
    run.finish()
    assert run.outputs[asks][0].num_cached_tokens == 0


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_no_token_is_planned_beyond_a_requests_limit(max_in_flight: int) -> None:
    run = Run(config_of(), max_in_flight)
    run.add([1, 2, 3], max_tokens=5, ignore_eos=True)
    run.add([1] * 60, ignore_eos=True)
    run.finish()
    for plan in run.trace:
        for row, position, tokens, _, _ in split(plan):
            # The last token is sampled and never computed.
            assert position + len(tokens) <= (3 + 5 - 1, 64 - 1)[row]


@pytest.mark.parametrize("max_in_flight", [2, 3])
def test_a_token_not_yet_seen_is_taken_from_the_device(max_in_flight: int) -> None:
    run = Run(config_of(), max_in_flight)
    run.add([1, 2, 3], max_tokens=8, ignore_eos=True)
    run.finish()
    assert [plan.token_ids for plan in run.trace] == [[1, 2, 3], *[[ON_DEVICE]] * 7]


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_a_request_aborted_while_its_token_is_in_flight_is_forgotten(max_in_flight: int) -> None:
    run = Run(config_of(max_num_seqs=1), max_in_flight)
    run.add([1, 2, 3], ignore_eos=True)
    while len(run.plans) < max_in_flight:
        plan = run.scheduler.schedule()
        assert plan is not None
        run.workers.submit(plan)
        run.plans.append(plan)
    run.abort("r0")
    run.scheduler.check()
    other = run.add([7, 8], max_tokens=3, ignore_eos=True)  # takes the same row and blocks
    run.finish()
    assert run.outputs["r0"] == []
    assert len(run.outputs[other]) == 3


def test_abort_is_harmless_twice_and_for_strangers() -> None:
    run = Run(config_of())
    name = run.add([1])
    assert run.scheduler.abort(name)
    assert not run.scheduler.abort(name)
    assert not run.scheduler.abort("stranger")
    assert run.requests[name][0].finish_reason == "abort"
    assert run.scheduler.schedule() is None


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_a_request_with_a_grammar_waits_for_its_token_and_others_do_not(max_in_flight: int) -> None:
    run = Run(config_of(), max_in_flight)
    run.add([1, 2, 3], grammar=(8, False), ignore_eos=True)
    run.add([4, 5, 6], max_tokens=8, ignore_eos=True)
    run.finish()
    masked = [plan for plan in run.trace if plan.mask_bits]
    assert len(masked) == 8
    for plan in masked:
        assert ON_DEVICE not in split(plan)[plan.masks.index(0)][2]
    alone = [plan for plan in run.trace if plan.rows == [1]]
    assert bool(alone) == (max_in_flight > 1)


def test_masks_are_of_positions_sampled_and_of_no_others() -> None:
    run = Run(config_of(prefill_chunk_tokens=2))
    run.add([1, 2, 3, 4, 5], grammar=(2, False), ignore_eos=True)
    run.add([1], max_tokens=4, ignore_eos=True)
    run.finish()
    assert [plan.masks for plan in run.trace] == [[NONE, NONE], [NONE, NONE], [0, NONE], [0, NONE]]


def test_a_grammars_end_comes_before_min_tokens_and_at_the_limit() -> None:
    run = Run(config_of())
    early = run.add([1], grammar=(2, False), min_tokens=9, ignore_eos=True)
    both = run.add([2], grammar=(2, False), max_tokens=2, ignore_eos=True)
    run.finish()
    for name in (early, both):
        last = run.outputs[name][-1]
        assert (last.finish_reason, last.stop_reason, last.ends_with_stop_token) == (
            "stop",
            None,
            False,
        )


def test_a_matcher_that_gives_up_ends_its_own_request_with_the_reason() -> None:
    run = Run(config_of())
    fails = run.add([1], grammar=(3, True), ignore_eos=True)
    other = run.add([2], max_tokens=9, ignore_eos=True)
    run.finish()
    last = run.outputs[fails][-1]
    assert (last.finish_reason, last.stop_reason) == ("error", "too complex")
    assert len(run.outputs[other]) == 9


def test_an_aborted_request_lets_go_of_its_matcher() -> None:
    run = Run(config_of())
    name = run.add([1], grammar=(9, False), ignore_eos=True)
    run.step()
    run.abort(name)
    assert run.requests[name][0].matcher is None
    run.finish()


def test_a_stop_id_the_caller_named_is_told_and_eos_is_not() -> None:
    def last_output(**options: Any) -> TokenOutput:
        run = Run(config_of(max_model_len=4096, num_blocks=1024))
        name = run.add([1], **options)
        run.finish()
        assert run.outputs[name][-1].finish_reason == "stop"
        return run.outputs[name][-1]

    assert (last_output().token_ids, last_output().stop_reason) == ([EOS], None)
    named = last_output(ignore_eos=True, stop_token_ids=[9])
    assert (named.token_ids, named.stop_reason) == ([9], 9)


def refuse(run: Run, error: type[Exception], prompt: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        run.add(prompt, **options)
    run.scheduler.check()
    assert not run.scheduler.has_unfinished
    return str(caught.value)


def test_a_prompt_that_leaves_no_room_in_the_context_is_refused_with_both_numbers() -> None:
    run = Run(config_of(max_model_len=8))
    assert "8 tokens" in refuse(run, RequestError, [1] * 8)
    message = refuse(run, RequestError, [1] * 9)
    assert "9 tokens" in message and "max_model_len is 8" in message
    run.add([1] * 7)
    run.finish()


def test_a_request_that_could_outgrow_the_pool_is_refused_with_both_numbers() -> None:
    run = Run(config_of(num_blocks=3))  # 12 tokens
    message = refuse(run, CapacityError, [1] * 5, max_tokens=9)
    assert "4 KV blocks" in message and "has 3" in message
    refuse(run, CapacityError, [1])  # the rest of the context
    run.add([1] * 5, max_tokens=8, ignore_eos=True)  # the 13th token is never computed
    run.finish()


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    run = Run(config_of())
    name = run.add([1])
    with pytest.raises(RequestError, match=f"'{name}' is already in use"):
        run.scheduler.add(Request(name, [1], SamplingParams(), seed=1))
    run.finish()
    run.scheduler.add(Request(name, [1], SamplingParams(), seed=1))


def test_a_result_of_another_step_is_our_own_mistake() -> None:
    run = Run(config_of())
    run.add([1])
    run.scheduler.schedule()
    with pytest.raises(AssertionError, match="result of step 7, not 0"):
        run.scheduler.update(StepPlan(7), StepResult([], []))


def test_planning_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, roofline.scheduling.scheduler\n"
        "sys.exit(', '.join({'torch', 'numpy'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
