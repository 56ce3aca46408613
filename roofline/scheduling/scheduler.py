"""Which tokens of which requests the next step computes: one rule for prompt chunks and decoding.

A request has tokens and a count of those computed; a step computes the next n. Results may arrive
several plans late, so nothing here waits for one. Integers only: no torch, no text, no clock.
"""

import dataclasses
import heapq
import secrets
from bisect import bisect_left, insort
from collections import deque
from operator import attrgetter

from roofline.errors import RequestError
from roofline.request import Request, TokenOutput
from roofline.scheduling.blocks import BlockPool
from roofline.scheduling.limits import SchedulerConfig
from roofline.scheduling.plan import ON_DEVICE, RowStart, StepPlan, StepResult


@dataclasses.dataclass(slots=True)
class SchedulerStats:
    """Where the scheduler stands, and what it has counted since it was made."""

    num_blocks: int
    num_used_blocks: int = 0
    num_cached_blocks: int = 0  # unowned; may be shared again or evicted
    num_running: int = 0
    num_waiting: int = 0
    num_requests: int = 0  # ever added
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0  # of all requests admitted
    prompt_tokens_cached: int = 0  # of those, found in the prefix cache
    generation_tokens: int = 0


@dataclasses.dataclass(slots=True)
class _Issued:
    """A plan whose result has not arrived: the request of each entry, and its epoch then."""

    plan: StepPlan
    requests: list[Request] = dataclasses.field(default_factory=list)
    epochs: list[int] = dataclasses.field(default_factory=list)

    def add(
        self, request: Request, token_ids: list[int], samples: int, block_ids: list[int]
    ) -> None:
        """Plan a request's next tokens."""
        self.requests.append(request)
        self.epochs.append(request.epoch)
        mask = request.matcher.mask() if samples and request.matcher is not None else None
        self.plan.add(request.row, request.num_computed, token_ids, samples, block_ids, mask)
        request.num_computed += len(token_ids)
        request.num_in_flight += samples

    def in_flight(self, request: Request) -> int:
        """Count the positions sampled here for a request where it is now."""
        entries = zip(self.requests, self.epochs, self.plan.samples, strict=True)
        return sum(n for owner, epoch, n in entries if owner is request and epoch == request.epoch)


_ORDER = attrgetter("order")


class Scheduler:
    """Requests wait, run in a row, may be preempted back to waiting, and finish.

    Lower (priority, arrival) goes first everywhere: in the step's budget, in admission, and last
    among those preempted when the block pool runs out.
    """

    def __init__(self, config: SchedulerConfig, secret: bytes | None = None) -> None:
        self.config = config
        self._pool = BlockPool(
            config.num_blocks,
            config.block_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            secret=secret or secrets.token_bytes(32),
        )
        self._chunk_tokens = config.prefill_chunk_tokens or config.max_num_batched_tokens
        self._requests: dict[str, Request] = {}  # alive, by id
        self._waiting: list[Request] = []  # sorted by order
        self._running: list[Request] = []  # sorted by order
        self._free_rows = list(range(config.max_num_seqs))  # a heap: the lowest is reused first
        self._issued: deque[_Issued] = deque()
        self._stats = SchedulerStats(config.num_blocks)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request still waits or runs."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request that could finish; others are refused."""
        if request.request_id in self._requests:
            raise RequestError(f"request id {request.request_id!r} is already in use")
        self.config.check_request(request)
        request.max_total_tokens = self.config.max_total_tokens(request)
        request.arrival = self._stats.num_requests
        request.order = (request.priority, request.arrival)
        self._stats.num_requests += 1
        self._requests[request.request_id] = request
        insort(self._waiting, request, key=_ORDER)

    def abort(self, request_id: str) -> bool:
        """End a request at any moment, without an output; False if it was not alive."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        request.finish("abort")
        self._leave(request)
        return True

    def reset(self) -> None:
        """End every request and forget what is cached: some planned step was never computed."""
        for request_id in list(self._requests):
            self.abort(request_id)
        self._issued.clear()
        self._pool.forget()

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when there is nothing to compute before a result arrives."""
        issued = _Issued(StepPlan(self._stats.num_steps))
        self._admit(issued, self._plan_running(issued))
        if not issued.requests:
            return None
        self._stats.num_steps += 1
        self._issued.append(issued)
        return issued.plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Give the tokens of the oldest plan outstanding to their requests; finish some."""
        issued = self._issued.popleft()
        assert issued.plan is plan, f"result of step {plan.step}, not {issued.plan.step}"
        if result.prompt_logprobs:
            _collect_prompt_logprobs(issued, result)
        outputs: list[TokenOutput] = []
        end = 0
        entries = zip(issued.requests, issued.epochs, plan.samples, result.counts, strict=True)
        for entry, (request, epoch, sampled, count) in enumerate(entries):
            start, end = end, end + count
            # Of an earlier epoch: it was preempted, aborted or finished meanwhile.
            if not sampled or request.epoch != epoch:
                continue
            request.num_in_flight -= sampled
            new = result.token_ids[start:end]
            output = self._accept(request, new)
            if result.logprobs and entry in result.logprobs:
                output.logprobs = result.logprobs[entry][: len(new)]
            outputs.append(output)
        return outputs

    def stats(self) -> SchedulerStats:
        """Count where every request and block is."""
        return dataclasses.replace(
            self._stats,
            num_used_blocks=self._pool.num_used,
            num_cached_blocks=self._pool.num_cached,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
        )

    def check(self) -> None:
        """Assert every invariant that holds between two calls; for tests."""
        running, waiting, config = self._running, self._waiting, self.config
        for queue in (running, waiting):
            assert queue == sorted(queue, key=_ORDER), "a queue lost its order"
        alive = {request.request_id: request for request in (*running, *waiting)}
        assert alive == self._requests and len(alive) == len(running) + len(waiting)
        rows = [request.row for request in running] + self._free_rows
        assert sorted(rows) == list(range(config.max_num_seqs)), "a row is lost or given twice"
        for request in waiting:
            idle = (request.row, request.num_computed, request.num_in_flight, request.blocks)
            assert idle == (-1, 0, 0, []), f"{request.request_id} waits and holds {idle}"
        for request in running:
            self._check_running(request)
        self._pool.check([request.blocks for request in running])

    def _check_running(self, request: Request) -> None:
        name, known, computed = request.request_id, len(request.tokens), request.num_computed
        in_flight = sum(issued.in_flight(request) for issued in self._issued)
        assert in_flight == request.num_in_flight, f"{name} miscounts its tokens in flight"
        assert known + in_flight <= request.max_total_tokens, f"{name} is too long"
        assert computed < known + max(in_flight, 1), f"{name} computes the unknown"
        assert request.matcher is None or in_flight <= 1, f"{name} runs ahead of its matcher"
        assert len(request.blocks) == self.config.blocks_for(computed)
        chain: list[bytes] = []
        self._pool.extend_chain(chain, request.tokens, known // self.config.block_tokens)
        assert request.chain == chain[: len(request.chain)], f"{name} has a stale digest"
        for index, block in enumerate(request.blocks):
            digest = self._pool.digest(block)
            if digest is not None:
                assert index < request.num_published and digest == chain[index]

    def _plan_running(self, issued: _Issued) -> int:
        """Plan the next tokens of every running request; return what is left of the budget."""
        block_tokens = self.config.block_tokens
        budget = self.config.max_num_batched_tokens
        # Preempting shortens the list at its end, never before the request at hand.
        for request in self._running:
            tokens, computed = request.tokens, request.num_computed
            in_flight = request.num_in_flight
            known = len(tokens)
            if in_flight and (
                request.matcher is not None or known + in_flight >= request.max_total_tokens
            ):
                continue  # its last token is on the way, or one that its matcher must see first
            if not budget:
                break
            if computed % block_tokens and (in_flight or computed + 1 == known):
                # Decoding inside a block: nearly every entry of a busy step.
                token = ON_DEVICE if in_flight else tokens[-1]
                issued.add(request, [token], 1, [])
                budget -= 1
                continue
            count = 1 if in_flight else min(known - computed, self._chunk_tokens, budget)
            blocks = self._grow(request, computed + count)
            if blocks is None:
                break  # it preempted itself, and so was the last
            self._plan_chunk(issued, request, count, blocks)
            budget -= count
        return budget

    def _grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Give a request blocks for its first `num_tokens` tokens, preempting others if it must."""
        needed = self.config.blocks_for(num_tokens) - len(request.blocks)
        while self._pool.num_available() < needed:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return None
        blocks = self._pool.allocate(needed)
        request.blocks += blocks
        return blocks

    def _admit(self, issued: _Issued, budget: int) -> None:
        """Start waiting requests in order, each with room for all the tokens it has.

        The head is never passed over: a long prompt is not starved by short ones behind it. What
        was just preempted cannot come straight back: its blocks are too few now, by those that
        somebody needed.
        """
        while self._waiting and self._free_rows and budget:
            request = self._waiting[0]
            known = len(request.tokens)
            cached = self._find_prefix(request)
            count = min(known - len(cached) * self.config.block_tokens, self._chunk_tokens, budget)
            missing = self.config.blocks_for(known) - len(cached)
            if self._pool.num_available(keep=cached) < missing:
                break
            del self._waiting[0]
            self._start(issued.plan, request, cached)
            blocks = self._grow(request, request.num_computed + count)
            assert blocks is not None
            self._plan_chunk(issued, request, count, cached + blocks)
            budget -= count

    def _find_prefix(self, request: Request) -> list[int]:
        """Find cached blocks for the request's tokens; its last known token is always computed."""
        if request.prompt_logprobs is not None:  # these need the logits of every position
            return []
        limit = (len(request.tokens) - 1) // self.config.block_tokens
        self._pool.extend_chain(request.chain, request.tokens, limit)
        return self._pool.lookup(request.chain[:limit])

    def _start(self, plan: StepPlan, request: Request, cached: list[int]) -> None:
        self._pool.share(cached)
        request.row = heapq.heappop(self._free_rows)
        request.blocks = list(cached)
        request.num_published = len(cached)
        request.num_computed = len(cached) * self.config.block_tokens
        insort(self._running, request, key=_ORDER)
        plan.starts.append(RowStart.of(request))
        if request.num_cached < 0:
            request.num_cached = request.num_computed
            self._stats.prompt_tokens += request.num_prompt
            self._stats.prompt_tokens_cached += request.num_cached

    def _plan_chunk(
        self, issued: _Issued, request: Request, count: int, new_blocks: list[int]
    ) -> None:
        """Enter the next `count` tokens of a request whose table has room for them."""
        start, in_flight = request.num_computed, request.num_in_flight
        tokens = [ON_DEVICE] if in_flight else request.tokens[start : start + count]
        samples = int(start + count == len(request.tokens) + in_flight)
        issued.add(request, tokens, samples, new_blocks)
        self._publish(request)

    def _publish(self, request: Request) -> None:
        """Offer the full blocks of known tokens to the prefix cache.

        They may be found before they are computed: writes precede reads in every layer of a step,
        and steps run in order.
        """
        full = min(request.num_computed, len(request.tokens)) // self.config.block_tokens
        if full > request.num_published and self.config.enable_prefix_caching:
            self._pool.extend_chain(request.chain, request.tokens, full)
            for index in range(request.num_published, full):
                self._pool.publish(request.blocks[index], request.chain[index])
            request.num_published = full

    def _accept(self, request: Request, new: list[int]) -> TokenOutput:
        """Append sampled tokens to a request, up to the one that ends it."""
        output = TokenOutput(request.request_id, new, request.num_prompt, request.num_cached)
        if request.prompt_logprobs is not None:
            output.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        for used, token in enumerate(new, 1):
            output.finish_reason = request.append(token)
            if output.finish_reason is not None:
                output.stop_reason = request.stop_reason
                output.ends_with_stop_token = request.ends_with_stop_token
                del new[used:]
                del self._requests[request.request_id]
                self._leave(request)
                break
        self._stats.generation_tokens += len(new)
        return output

    def _preempt(self, request: Request) -> None:
        """Take a request out of its row; its known tokens will be computed again."""
        self._leave(request)
        if request.prompt_logprobs:
            request.prompt_logprobs = []
        insort(self._waiting, request, key=_ORDER)
        self._stats.num_preemptions += 1

    def _leave(self, request: Request) -> None:
        """Take a request out of its queue, and out of its row and blocks if it runs."""
        queue = self._waiting if request.row < 0 else self._running
        del queue[bisect_left(queue, request.order, key=_ORDER)]
        if request.row < 0:
            return
        self._publish(request)
        self._pool.release(request.blocks)
        heapq.heappush(self._free_rows, request.row)
        request.leave_row()


def _collect_prompt_logprobs(issued: _Issued, result: StepResult) -> None:
    for entry, logprobs in result.prompt_logprobs.items():
        request = issued.requests[entry]
        if request.epoch == issued.epochs[entry] and request.prompt_logprobs is not None:
            request.prompt_logprobs += logprobs
