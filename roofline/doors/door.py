"""A loaded model, and how prompts and conversations become requests: what both doors share.

How the engine is driven is each door's own.
"""

import contextlib
import dataclasses
import gc
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypedDict

from roofline import execution
from roofline.budget import RankBudget
from roofline.config import EngineConfig, ModelConfig
from roofline.doors.generation import Generation
from roofline.doors.progress import loading_bar, tell, warm_up_bar
from roofline.engine import Engine
from roofline.errors import RequestError, UsageError, shown
from roofline.grammars.compiler import GrammarCompiler
from roofline.models.checkpoints.tensors import tensor_shapes
from roofline.models.opening import OpenedModel, open_model
from roofline.request import Request, SamplingParams, child_seed
from roofline.scheduling.limits import SchedulerConfig
from roofline.scheduling.scheduler import Scheduler
from roofline.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class ChatOptions(TypedDict, total=False):
    """How a conversation is written out for the model: vLLM's names."""

    add_generation_prompt: bool  # end where the assistant begins; default: unless it continues
    continue_final_message: bool  # leave the last message open, for the model to go on with
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None  # further variables, JSON values


class Door:
    """A model loaded and ready. Options are those of `EngineConfig`; unknown ones are refused."""

    def __init__(self, model: str, **options: Any) -> None:
        self._start(model, EngineConfig.from_options(options, os.environ))

    @classmethod
    def from_config(cls, model: str, config: EngineConfig) -> Self:
        """Load with options already gathered; the environment is not read again."""
        door = cls.__new__(cls)
        door._start(model, config)
        return door

    def _start(self, model: str, config: EngineConfig) -> None:
        if not isinstance(model, str):
            raise UsageError(f"model is {shown(model)}; it must be a name or a path, as text")
        with _uncollected():
            opened, config, workers = _load(model, config)
        shape = opened.config
        if config.is_on_gpu:
            with warm_up_bar(len(execution.device_runner.WARM_UP_TOKENS)) as advance:
                workers.warm_up(advance)
        if (reason := workers.backend.reason) is not None:
            tell(f"PyTorch's ops run in place of the native kernels, slowly: {reason}")
        self.config, self.model_config = config, shape
        self.budget: RankBudget = workers.budget
        self.storage_bytes: Callable[[], dict[str, int]] = workers.storage_bytes
        self.replay_s: Callable[[], float | None] = workers.replay_s
        self._tokenizer = opened.tokenizer
        self._grammars = GrammarCompiler(opened.tokenizer, shape.eos_token_ids, shape.vocab_size)
        self._defaults = SamplingParams.from_options(opened.sampling_defaults)
        self._engine = Engine(Scheduler(_scheduler_config(config, workers.budget, shape)), workers)
        self._numbers = itertools.count()  # of requests, in the order they were asked for

    @property
    def max_model_len(self) -> int:
        """Tokens a request may have, prompt and output."""
        return self.budget.step.max_model_len

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; RequestError for a shape without one."""
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer; give prompts as token ids")
        return self._tokenizer

    def default_sampling_params(self) -> SamplingParams:
        """What holds where no sampling parameters are given: the model's generation config."""
        return self._defaults

    def stats(self) -> dict[str, int]:
        """Where requests and blocks are, and what has been counted."""
        return dataclasses.asdict(self._engine.stats())

    def _generation(
        self, number: int, prompt: Prompt, params: SamplingParams, priority: int
    ) -> Generation:
        """A prompt as checked requests, which have not reached the engine."""
        text, ids = self._prompt_ids(prompt)
        bad_words_ids = self._bad_words_ids(params)
        seed = child_seed(self.config.seed, number) if params.seed is None else params.seed
        matchers = self._grammars.matchers(params)
        requests = [
            Request(
                f"{number}-{child}",
                ids,
                params,
                seed=seed if params.n == 1 else child_seed(seed, child),
                eos_token_ids=self.model_config.eos_token_ids,
                bad_words_ids=bad_words_ids,
                priority=priority,
                matcher=matchers[child],
            )
            for child in range(params.n)
        ]
        self._engine.check_request(requests[0])
        return Generation(requests, text, self._tokenizer)

    def _chat_ids(self, messages: Messages, options: ChatOptions) -> list[int]:
        """A conversation as the chat template writes it."""
        for name in options.keys() - ChatOptions.__annotations__.keys():
            known = ", ".join(ChatOptions.__annotations__)
            raise RequestError(f"unknown chat option {shown(name)}; known: {known}")
        given: dict[str, Any] = {**options}
        variables = given.pop("chat_template_kwargs", None) or {}
        _check_template_kwargs(variables)
        return self.get_tokenizer().apply_chat_template(messages, **given, **variables)

    def _close(self) -> None:
        """Free what both doors hold."""
        self._engine.close()
        self._grammars.close()
        if self._tokenizer is not None:
            self._tokenizer.close()

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


def _load(
    model: str, config: EngineConfig
) -> tuple[OpenedModel, EngineConfig, "execution.workers.InProcessWorkers"]:
    """The model, the config with its device resolved, and the workers that hold its weights."""
    opened = open_model(model, config)
    try:
        config, unused = execution.devices.resolve(config)
        if unused is not None:
            tell(f"the CPU runs this, not the GPU: {unused}")
        note = opened.growth(config.weights)
        with loading_bar("Loading", len(tensor_shapes(opened.config)), note) as progress:
            workers = execution.workers.InProcessWorkers(config, opened.checkpoint, progress)
    finally:
        opened.checkpoint.close()
    return opened, config, workers


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No collection of garbage: importing torch makes half a million objects, none of it garbage.

    Each collection would walk all those that are there, 0.3 s in all.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_template_kwargs(variables: object) -> None:
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise RequestError(
            f"chat_template_kwargs is {shown(variables)}; it must map names to JSON values"
        )
    for name in ("messages", *ChatOptions.__annotations__):
        if name in variables:
            raise RequestError(f"chat_template_kwargs has {name}; give it as an option of its own")


def _scheduler_config(
    config: EngineConfig, budget: RankBudget, model: ModelConfig
) -> SchedulerConfig:
    limits = config.limits
    return SchedulerConfig(
        num_blocks=budget.num_blocks,
        block_tokens=limits.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=budget.step.max_model_len,
        vocab_size=model.vocab_size,
        enable_prefix_caching=config.enable_prefix_caching,
        prefill_chunk_tokens=config.max_prefill_chunk,
    )
