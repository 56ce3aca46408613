"""The routes: what each reads, asks of the engine and sends; what a field means is in `openai`.

`create_app` is the whole application, for one model.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from roofline.async_llm import AsyncLLM
from roofline.doors.outputs import RequestOutput
from roofline.errors import RequestError, RooflineError, shown
from roofline.request import SamplingParams, check_token_ids
from roofline.server import body, envelope, stream, waiting
from roofline.server.answers import Answers, ChatAnswers, CompletionAnswers
from roofline.server.openai import ChatRequest, CompletionRequest
from roofline.server.response_format import FormRequest

_CLIENT_GONE = 499  # nginx's; nobody is left to read it
_MAX_CHOICES = 1024  # of one HTTP request: prompts times n
_MAX_SCORES = 1 << 20  # log-probabilities of prompts, each with those beside it

_log = logging.getLogger(__name__)


def create_app(llm: AsyncLLM, model: str, version: str) -> FastAPI:
    """The application of this version that serves a loaded model under a name."""
    app = FastAPI(title="Roofline", openapi_url=None, redirect_slashes=False)
    routes = _Routes(llm, model, version)
    for method, path, endpoint in (
        ("POST", "/v1/chat/completions", routes.chat_completions),
        ("POST", "/v1/completions", routes.completions),
        ("GET", "/v1/models", routes.models),
        ("GET", "/v1/models/{name:path}", routes.one_model),
        ("GET", "/health", routes.health),
        ("GET", "/ping", routes.health),
        ("GET", "/version", routes.version),
    ):
        app.add_api_route(path, endpoint, methods=[method])
    for error in (RooflineError, HTTPException, Exception):
        app.add_exception_handler(error, _tell)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=_CLIENT_GONE))
    return app


class _Routes:
    """The endpoints, over one model."""

    def __init__(self, llm: AsyncLLM, model: str, version: str) -> None:
        self._llm, self._model, self._version = llm, model, version
        self._tokenizer = llm.get_tokenizer()
        self._created = int(time.time())

    async def chat_completions(self, request: Request) -> Response:
        """An answer in a conversation."""
        asked = ChatRequest.from_body(await body.read_json(request))
        self._check_model(asked.model)
        params = asked.to_params(self._llm.default_sampling_params())
        if self._tokenizer.chat_template is None:
            raise RequestError(f"{self._model} has no chat template; send text to /v1/completions")
        try:
            ids = await asyncio.to_thread(
                self._tokenizer.apply_chat_template,
                asked.to_messages(),
                **asked.to_template_options(),
            )
        except RequestError as error:
            error.param = error.param or "messages"
            raise
        self._check_length("messages", ids, asked.max_tokens)
        answers = ChatAnswers(
            self._model, self._tokenizer, asked.stream_options, asked.top_logprobs
        )
        return await self._answer(request, asked, [ids], params, answers)

    async def completions(self, request: Request) -> Response:
        """Continuations of one text or several."""
        asked = CompletionRequest.from_body(await body.read_json(request))
        self._check_model(asked.model)
        params = asked.to_params(self._llm.default_sampling_params())
        given = asked.to_prompts()
        prompts = await asyncio.to_thread(self._encode, given)
        for index, ids in enumerate(prompts):
            name = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
            self._check_length(name, ids, asked.max_tokens)
        _check_products(prompts, params)
        hidden = self._tokenizer.special_ids if params.skip_special_tokens else ()
        answers = CompletionAnswers(
            self._model,
            self._tokenizer,
            asked.stream_options,
            hidden=hidden,
            echo=self._texts(given, params.skip_special_tokens) if asked.echo else None,
            echo_alone=asked.echoes_alone,
        )
        return await self._answer(request, asked, prompts, params, answers)

    async def models(self) -> Response:
        """The one model."""
        return _json({"object": "list", "data": [self._card()]})

    async def one_model(self, name: str) -> Response:
        """The one model, by its name."""
        self._check_model(name)
        return _json(self._card())

    async def health(self) -> Response:
        """The server answers: the model has been loaded."""
        return _json({"status": "ok"})

    async def version(self) -> Response:
        """Roofline's version."""
        return _json({"version": self._version})

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        answers: Answers,
    ) -> Response:
        """Run the prompts; a refusal has its status, for nothing is sent before the first event."""
        streams = [self._llm.generate(ids, params, priority=asked.priority) for ids in prompts]
        updates = waiting.updates(streams, stream.PULSE_S)
        with _as_named_in(asked):
            if asked.stream:
                events = stream.events(answers, updates)
                first = await waiting.until_gone(request.receive, anext(events))
                return stream.EventStream(first, events)
            outputs = await waiting.until_gone(request.receive, _last(updates))
            return _json(answers.whole(outputs))

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._model):
            raise RequestError(
                f"model {shown(name)} is not served here; this is {self._model}",
                param="model",
                code="model_not_found",
            )

    def _check_length(self, param: str, ids: list[int], max_tokens: int | None) -> None:
        """Refuse what would not fit the context; nothing is cut off silently."""
        check_token_ids(param, ids, self._llm.model_config.vocab_size)
        wanted = 1 if max_tokens is None else max_tokens
        if len(ids) + wanted > self._llm.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {self._llm.max_model_len} tokens. "
                f"However, you requested {len(ids) + wanted} tokens ({len(ids)} in the {param}, "
                f"{wanted} in the completion). Please reduce either.",
                param=param,
                code="context_length_exceeded",
            )

    def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        return [self._tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]

    def _texts(self, prompts: Sequence[str | list[int]], skip_special: bool) -> list[str]:
        decode = self._tokenizer.decode
        return [
            p if isinstance(p, str) else decode(p, skip_special_tokens=skip_special)
            for p in prompts
        ]

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "roofline",
            "root": self._model,
            "parent": None,
            "max_model_len": self._llm.max_model_len,
        }


def _check_products(prompts: Sequence[list[int]], params: SamplingParams) -> None:
    """Refuse what is modest in each field and too much in all."""
    choices = len(prompts) * params.n
    if choices > _MAX_CHOICES:
        raise RequestError(
            f"{len(prompts)} prompts and n {params.n} make {choices} answers; "
            f"at most {_MAX_CHOICES} are made for one request",
            param="n",
        )
    scores = sum(map(len, prompts)) * (1 + (params.prompt_logprobs or 0))
    if params.prompt_logprobs is not None and scores > _MAX_SCORES:
        raise RequestError(
            f"echo with logprobs {params.prompt_logprobs} of these prompts makes {scores} "
            f"log-probabilities; at most {_MAX_SCORES} are made for one request",
            param="logprobs",
        )


@contextlib.contextmanager
def _as_named_in(asked: FormRequest) -> Iterator[None]:
    """Tell what is wrong with a form by the field that asked for it."""
    try:
        yield
    except RequestError as error:
        if error.param == "structured_outputs":
            error.param = asked.form_field
        raise


async def _last(updates: AsyncGenerator[waiting.News, None]) -> list[RequestOutput]:
    """The output of every prompt, in order, when all are finished."""
    outputs: dict[int, RequestOutput] = {}
    async with contextlib.aclosing(updates):
        async for news in updates:
            outputs.update(news)
    return [outputs[prompt] for prompt in sorted(outputs)]


def _json(content: object) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")


async def _tell(request: Request, error: Exception) -> Response:
    """Answer an error in the envelope; those of ours go to the log."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error.detail += f": {shown(f'{request.method} {request.url.path}')}"
    response = envelope.of(error)
    if response.status_code >= 500:
        cause = error.__cause__ or error
        path = request.url.path
        _log.error("%s failed: %s: %s", path, type(cause).__name__, cause)
        _log.debug("where it failed", exc_info=error)
    return response
