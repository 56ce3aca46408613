"""The Python door: `LLM(model).generate(prompts, SamplingParams())`, with vLLM's names and results.

Text becomes ids on the way in and ids become text on the way out; everything between is the
engine's. One thread at a time.
"""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress

from roofline import execution
from roofline.budget import RankBudget
from roofline.config import EngineConfig, ModelConfig
from roofline.engine import Engine
from roofline.errors import RequestError, UsageError, shown
from roofline.models.checkpoints.tensors import tensor_shapes
from roofline.models.opening import open_model
from roofline.request import Request, SamplingParams, TokenLogprobs, TokenOutput, child_seed
from roofline.scheduling.scheduler import Scheduler, SchedulerConfig
from roofline.tokenizer import TextStream, Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one position, under the raw logits."""

    logprob: float
    rank: int  # 1 = the likeliest
    decoded_token: str | None


@dataclasses.dataclass
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # for each of token_ids
    finish_reason: str | None = None  # stop, length or abort
    stop_reason: int | str | None = None  # the stop token id or stop string that ended it


@dataclasses.dataclass
class RequestMetrics:
    """Moments of a request, seconds of `time.monotonic`."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None


@dataclasses.dataclass
class RequestOutput:
    """A prompt and its n answers."""

    request_id: str
    prompt: str | None  # None where ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # the first is None
    num_cached_tokens: int = 0
    finished: bool = False


class LLM:
    """A model loaded and ready. Options are those of `EngineConfig`; unknown ones are refused."""

    def __init__(self, model: str, **options: Any) -> None:
        self._start(model, EngineConfig.from_options(options, os.environ))

    @classmethod
    def from_config(cls, model: str, config: EngineConfig) -> Self:
        """Load with options already gathered; the environment is not read again."""
        llm = cls.__new__(cls)
        llm._start(model, config)
        return llm

    def _start(self, model: str, config: EngineConfig) -> None:
        if not isinstance(model, str):
            raise UsageError(f"model is {shown(model)}; it must be a name or a path, as text")
        opened = open_model(model, config)
        try:
            note = opened.growth(config.weights)
            with loading_bar("Loading", opened.config, note) as progress:
                workers = execution.workers.InProcessWorkers(config, opened.checkpoint, progress)
        finally:
            opened.checkpoint.close()
        self.config, self.model_config = config, opened.config
        self.budget: RankBudget = workers.budget
        self.storage_bytes: Callable[[], dict[str, int]] = workers.storage_bytes
        self._tokenizer = opened.tokenizer
        scheduler = Scheduler(_scheduler_config(config, workers.budget, self.model_config))
        self._engine = Engine(scheduler, workers)
        self._counter = itertools.count()
        self._alive: dict[str, _Generation] = {}  # by request id

    @property
    def max_model_len(self) -> int:
        """Tokens a request may have, prompt and output."""
        return self.budget.step.max_model_len

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; RequestError for a shape without one."""
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer; give prompts as token ids")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts (text or token ids), in their order.

        Text is text: a special token's name in it is spelled out, not obeyed. Everything is
        checked before anything runs.
        """
        asked = self._generations(prompts, sampling_params, priority)
        for _ in self._run(asked):
            pass
        return [generation.output for generation in asked]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding its output after every step that adds to it.

        It is one object that grows: take what you need of it before the next.
        """
        asked = self._generations([prompt], sampling_params, None)
        for generation in self._run(asked):
            yield generation.output

    def stats(self) -> dict[str, int]:
        """Where requests and blocks are, and what has been counted."""
        return dataclasses.asdict(self._engine.stats())

    def close(self) -> None:
        """Free the model's memory."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _generations(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list["_Generation"]:
        """Everything asked for, checked; nothing has reached the engine."""
        listed = _list_prompts(prompts)
        params = SamplingParams() if params is None else params
        each = _spread("sampling_params", params, SamplingParams, len(listed))
        priorities = _spread("priority", 0 if priority is None else priority, int, len(listed))
        return [
            self._generation(prompt, own, rank)
            for prompt, own, rank in zip(listed, each, priorities, strict=True)
        ]

    def _generation(self, prompt: Prompt, params: SamplingParams, priority: int) -> "_Generation":
        number = next(self._counter)
        text, ids = self._prompt_ids(prompt)
        params.check(self.model_config.vocab_size)
        seed = child_seed(self.config.seed, number) if params.seed is None else params.seed
        requests = [
            Request(
                f"{number}-{child}",
                ids,
                params,
                seed=seed if params.n == 1 else child_seed(seed, child),
                eos_token_ids=self.model_config.eos_token_ids,
                bad_words_ids=self._bad_words_ids(params),
                priority=priority,
            )
            for child in range(params.n)
        ]
        return _Generation(requests, text, self._tokenizer)

    def _prompt_ids(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """The text of a prompt, if it came as text, and its token ids."""
        if isinstance(prompt, Mapping):
            if set(prompt) not in ({"prompt"}, {"prompt_token_ids"}):
                raise RequestError(
                    "a prompt object holds 'prompt' or 'prompt_token_ids', nothing else"
                )
            (prompt,) = prompt.values()
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer().encode(prompt)
        if not isinstance(prompt, Sequence):
            raise RequestError(f"a prompt is {shown(prompt)}; it must be text or token ids")
        return None, list(prompt)

    def _bad_words_ids(self, params: SamplingParams) -> list[list[int]]:
        """Each bad word as ids, at the start of a text and, where as long, after a space (vLLM)."""
        found = []
        for word in params.bad_words or ():
            encode = self.get_tokenizer().encode
            if not word.strip():
                raise RequestError(f"bad_words has {shown(word)}; it must hold more than spaces")
            bare = encode(word.lstrip(), add_special_tokens=False)
            spaced = encode(" " + word.lstrip(), add_special_tokens=False)
            found.append(bare)
            if len(spaced) == len(bare) and spaced[0] != bare[0]:
                found.append(spaced)
        return found

    def _run(self, asked: Sequence["_Generation"]) -> Iterator["_Generation"]:
        """Drive the engine until all asked are finished, yielding each one that has grown."""
        mine = {r.request_id for generation in asked for r in generation.requests}
        try:
            for generation in asked:
                for request in generation.requests:
                    self._engine.add(request)
                    self._alive[request.request_id] = generation
            while mine & self._alive.keys() or any(generation.has_news for generation in asked):
                for generation in asked:
                    if generation.has_news:
                        generation.has_news = False
                        yield generation
                if mine & self._alive.keys():
                    self._step()
        finally:
            for request_id in mine & self._alive.keys():
                self._drop(request_id)

    def _step(self) -> None:
        """Run one step; what it brings goes to whoever asked, this caller or another."""
        try:
            outputs = self._engine.step()
        except BaseException:  # the engine has ended every request, this caller's and others'
            for request_id, generation in self._alive.items():
                generation.abort(request_id)
            self._alive.clear()
            raise
        for output in outputs:
            generation = self._alive[output.request_id]
            generation.take(output)
            if generation.ended(output.request_id):
                self._drop(output.request_id)

    def _drop(self, request_id: str) -> None:
        """Forget a request; the engine ends it if it has not."""
        self._engine.abort(request_id)
        del self._alive[request_id]


class _Generation:
    """A prompt in the engine: its n requests, and the output they grow."""

    def __init__(
        self, requests: Sequence[Request], prompt: str | None, tokenizer: Tokenizer | None
    ) -> None:
        self.requests = requests
        first = requests[0]
        self._params, self._tokenizer = first.sampling, tokenizer
        self._children = {r.request_id: index for index, r in enumerate(requests)}
        self._streams = [self._text_stream() for _ in requests]
        self.has_news = False  # the output has grown since it was last given out
        self.output = RequestOutput(
            request_id=first.request_id.partition("-")[0],
            prompt=prompt,
            prompt_token_ids=list(first.tokens),
            outputs=[CompletionOutput(index) for index in range(len(requests))],
            metrics=RequestMetrics(time.monotonic()),
        )

    def _text_stream(self) -> TextStream | None:
        if self._tokenizer is None:
            if self._params.stop:
                raise RequestError("stop strings need a tokenizer, and this model has none")
            return None
        return TextStream(
            self._tokenizer,
            stop=self._params.stop or (),
            include_stop_str_in_output=self._params.include_stop_str_in_output,
            skip_special_tokens=self._params.skip_special_tokens,
            after=self.requests[0].tokens,
        )

    def abort(self, request_id: str) -> None:
        """End a child whose step has failed."""
        self.output.outputs[self._children[request_id]].finish_reason = "abort"
        self.output.finished = all(o.finish_reason is not None for o in self.output.outputs)
        self.has_news = True

    def ended(self, request_id: str) -> bool:
        """Whether a child has its finish reason."""
        return self.output.outputs[self._children[request_id]].finish_reason is not None

    def take(self, new: TokenOutput) -> None:
        """Add what a step brought to one child: ids, text, log-probabilities, its end."""
        child = self._children[new.request_id]
        answer, metrics = self.output.outputs[child], self.output.metrics
        self.has_news = True
        metrics.last_token_time = time.monotonic()
        metrics.first_token_time = metrics.first_token_time or metrics.last_token_time
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, new.num_cached_tokens)
        answer.token_ids += new.token_ids
        self._take_logprobs(answer, new)
        answer.finish_reason, answer.stop_reason = new.finish_reason, new.stop_reason
        stream = self._streams[child]
        if stream is not None:
            self._take_text(answer, stream, new)
        self.output.finished = all(o.finish_reason is not None for o in self.output.outputs)

    def _take_text(self, answer: CompletionOutput, stream: TextStream, new: TokenOutput) -> None:
        """Add the text of new ids; a stop token's own is dropped, a stop string ends it."""
        params, ids = self._params, new.token_ids
        if new.finish_reason == "stop" and not params.include_stop_str_in_output:
            ids = ids[:-1]
        may_stop = len(answer.token_ids) > params.min_tokens
        answer.text += stream.push(ids, may_stop=may_stop)
        if stream.stopped_by is not None:
            answer.finish_reason, answer.stop_reason = "stop", stream.stopped_by
        elif new.finish_reason is not None:
            answer.text += stream.finish()

    def _take_logprobs(self, answer: CompletionOutput, new: TokenOutput) -> None:
        if new.logprobs is not None:
            answer.logprobs = (answer.logprobs or []) + [self._logprobs(t) for t in new.logprobs]
            total = sum(token.logprob for token in new.logprobs)
            answer.cumulative_logprob = (answer.cumulative_logprob or 0.0) + total
        if new.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None, *map(self._logprobs, new.prompt_logprobs)]

    def _logprobs(self, token: TokenLogprobs) -> dict[int, Logprob]:
        """The token itself first, then the likeliest; the shape vLLM returns."""
        ranked = [(token.token_id, token.logprob, token.rank)]
        ranked += [(i, logprob, rank) for rank, (i, logprob) in enumerate(token.top, 1)]
        found: dict[int, Logprob] = {}
        for token_id, logprob, rank in ranked:
            if token_id not in found:
                found[token_id] = Logprob(logprob, rank, self._token_text(token_id))
        return found

    def _token_text(self, token_id: int) -> str | None:
        """A token as text; None for a padding row of the embedding, or without a tokenizer."""
        if self._tokenizer is None or token_id >= self._tokenizer.vocab_size:
            return None
        return self._tokenizer.token_text(token_id)


@contextlib.contextmanager
def loading_bar(
    verb: str, model: ModelConfig, note: str | None = None
) -> Iterator[Callable[[str], None]]:
    """On a terminal's stderr, a line if there is one, and a bar advanced by each tensor's name."""
    console = Console(stderr=True)
    if note is not None and console.is_terminal:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(verb, total=len(tensor_shapes(model)))
        yield lambda name: bar.update(task, advance=1, description=f"{verb} {name}")


def _scheduler_config(
    config: EngineConfig, budget: RankBudget, model: ModelConfig
) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=budget.num_blocks,
        block_tokens=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=budget.step.max_model_len,
        vocab_size=model.vocab_size,
        enable_prefix_caching=config.enable_prefix_caching,
        prefill_chunk_tokens=config.max_prefill_chunk,
    )


def _list_prompts(prompts: Any) -> list[Prompt]:
    """The prompts in a list, where there may be one: a string, an object, or a list of ids."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError("prompts must be text, token ids, or a list of those")
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]
    return list(prompts)


def _spread(name: str, value: Any, kind: type, count: int) -> list[Any]:
    """One value for each prompt, from one for all or a list of as many."""
    if isinstance(value, kind):
        return [value] * count
    listed = list(value) if isinstance(value, Sequence) else []
    if len(listed) != count or not all(isinstance(item, kind) for item in listed):
        raise RequestError(
            f"{name} is {shown(value)}; it must be one {kind.__name__} for all prompts or "
            f"a list of {count}, one for each"
        )
    return listed
