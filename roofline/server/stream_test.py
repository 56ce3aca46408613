import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from roofline.doors.outputs import CompletionOutput, RequestMetrics, RequestOutput
from roofline.errors import EngineError, RequestError
from roofline.server import stream
from roofline.server.answers import ChatAnswers
from roofline.server.openai import StreamOptions
from roofline.server.stream import EventStream, events
from roofline.server.waiting import News
from roofline.tokenizer import Tokenizer
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_tiny_model(tmp_path_factory.mktemp("tiny")))


async def saying(*script: str | Exception | None) -> AsyncGenerator[News, None]:
    """Text piece by piece; None for a pause."""
    own = CompletionOutput(0)
    grown = RequestOutput("0", None, [1, 2], [own], RequestMetrics(0.0))
    for said in script:
        if isinstance(said, Exception):
            raise said
        if said is not None:
            own.text += said
            own.token_ids += [3]
            own.finish_reason = "stop" if said == "!" else None
        yield [(0, grown)] if said is not None else []


def sent(answers: ChatAnswers, *script: str | Exception | None) -> list[bytes]:
    async def main() -> list[bytes]:
        return [data async for data in events(answers, saying(*script))]

    return asyncio.run(main())


def test_a_stream_is_these_bytes(tokenizer: Tokenizer) -> None:
    answers = ChatAnswers("m", tokenizer, StreamOptions(include_usage=True), 0)
    head = (
        f'data: {{"id":"{answers._id}","object":"chat.completion.chunk",'
        f'"created":{answers._created},"model":"m","choices":['
    )
    rest = '"logprobs":null,"finish_reason":'
    usage = (
        '{"prompt_tokens":2,"completion_tokens":2,"total_tokens":4,'
        '"prompt_tokens_details":{"cached_tokens":0}}'
    )
    expected = [
        f'{head}{{"index":0,"delta":{{"role":"assistant","content":""}},{rest}null}}],"usage":null}}\n\n'
        f'{head}{{"index":0,"delta":{{"content":"Grüße"}},{rest}null}}],"usage":null}}\n\n',
        ": ping\n\n",
        f'{head}{{"index":0,"delta":{{"content":"!"}},{rest}"stop"}}],"usage":null}}\n\n',
        f'{head}],"usage":{usage}}}\n\ndata: [DONE]\n\n',
    ]
    assert sent(answers, "Grüße", None, "!") == [text.encode() for text in expected]


def test_a_step_without_text_sends_nothing(tokenizer: Tokenizer) -> None:
    answers = ChatAnswers("m", tokenizer, None, 0)
    assert len(sent(answers, "a", "", "", "!")) == 3  # the last is [DONE]


def test_an_error_before_the_first_event_is_raised(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError):
        sent(ChatAnswers("m", tokenizer, None, 0), RequestError("no"))


def test_an_error_later_is_told_in_the_stream(tokenizer: Tokenizer) -> None:
    answers = ChatAnswers("m", tokenizer, None, 0)
    *_, last = sent(answers, "a", EngineError("secret"))
    assert last.startswith(b'data: {"error":{"message":') and b"secret" not in last
    assert last.endswith(b"}\n\ndata: [DONE]\n\n") and last.count(b"data: ") == 2


class Client:
    """Takes `accepts` messages and then no more; leaves after `leaves_s`."""

    def __init__(self, accepts: int = 1000, leaves_s: float = 60.0) -> None:
        self.accepts, self.leaves_s = accepts, leaves_s
        self.got: list[Any] = []

    async def send(self, message: Any) -> None:
        if len(self.got) >= self.accepts:
            await asyncio.sleep(60)
        self.got.append(message)

    async def receive(self) -> dict[str, str]:
        await asyncio.sleep(self.leaves_s)
        return {"type": "http.disconnect"}


def respond(client: Client, wait_s: float = 0.0) -> bool:
    """Send a stream to the client; whether its source was closed."""
    closed = False

    async def source() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            for index in range(5):
                await asyncio.sleep(wait_s)
                yield b"data: %d\n\n" % index
        finally:
            closed = True

    async def main() -> None:
        response = EventStream(b"data: first\n\n", source())
        await response({"type": "http"}, client.receive, client.send)

    asyncio.run(main())
    return closed


def test_the_response_is_events_that_nothing_holds_back() -> None:
    client = Client()
    assert respond(client)
    start, *bodies = client.got
    assert start["status"] == 200
    assert dict(start["headers"]) == {
        b"content-type": b"text/event-stream; charset=utf-8",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
    }
    assert b"".join(message.get("body", b"") for message in bodies) == (
        b"data: first\n\ndata: 0\n\ndata: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\n"
    )
    assert [message.get("more_body", False) for message in bodies] == [True] * 6 + [False]


def test_a_client_that_leaves_ends_its_source() -> None:
    client = Client(leaves_s=0.05)
    assert respond(client, wait_s=0.04)
    assert len(client.got) < 5


def test_a_client_that_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STALL_S", 0.05)
    client = Client(accepts=3)
    assert respond(client)
    assert len(client.got) == 3
