import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.routing import APIRoute

from roofline.async_llm import AsyncLLM
from roofline.errors import RequestError
from roofline.execution.runner import ModelRunner
from roofline.grammars.matching import GrammarMatcher
from roofline.server.app import create_app
from tests.serving import VERSION, serving
from tests.tiny_model import CONTEXT, write_tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hello"}]
FORM = "response_format"
BOTH = ("add_generation_prompt", "continue_final_message")


def schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    door = AsyncLLM(str(write_tiny_model(tmp_path_factory.mktemp("tiny"))), max_num_seqs=4)
    yield door
    door.close()


@pytest.fixture(scope="module")
def client(llm: AsyncLLM) -> Iterator[httpx2.Client]:
    with serving(llm) as url, httpx2.Client(base_url=url, timeout=60) as client:
        yield client


def refusal(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert list(error) == ["message", "type", "param", "code"]
    return error


def heard_from(
    client: httpx2.Client, body: dict[str, Any], heard: threading.Event
) -> httpx2.Response:
    """A whole response, of which `heard` tells that a stream has begun."""
    if not body["stream"]:
        heard.set()
    with client.stream("POST", COMPLETIONS, json=body) as response:
        heard.set()
        response.read()
    return response


def test_these_are_all_the_routes(llm: AsyncLLM) -> None:
    app = create_app(llm, "tiny", VERSION)
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    assert len(routes) == len(app.routes)
    assert [(*(route.methods or ()), route.path) for route in routes] == [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name:path}"),
        ("GET", "/health"),
        ("GET", "/ping"),
        ("GET", "/version"),
    ]


def test_the_model_says_what_it_is(client: httpx2.Client) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/tiny").json() == card
    assert card.pop("created") > 1e9
    assert card == {
        "id": "tiny",
        "object": "model",
        "owned_by": "roofline",
        "root": "tiny",
        "parent": None,
        "max_model_len": CONTEXT,
    }


def test_probes_answer(client: httpx2.Client) -> None:
    assert [client.get(path).status_code for path in ("/health", "/ping")] == [200, 200]
    assert client.get("/version").json() == {"version": VERSION}


def test_what_is_not_there_is_told_in_the_envelope(client: httpx2.Client) -> None:
    assert "'GET /v2/models'" in refusal(client.get("/v2/models"), 404)["message"]
    assert refusal(client.get("/v1/models/"), 404)["code"] == "model_not_found"
    for name in ("gpt-4", "../../etc/passwd", "x" * 5000):
        error = refusal(client.get(f"/v1/models/{name}"), 404)
        assert len(error["message"]) < 200
    assert refusal(client.get("/x" * 3000), 404)
    response = client.get(CHAT)
    refusal(response, 405)
    assert response.headers["allow"] == "POST"
    refusal(client.post(CHAT, content=b"{}"), 415)
    refusal(client.post(CHAT, json=[]), 400)


def test_another_model_is_not_found_and_none_is_this_one(client: httpx2.Client) -> None:
    body = {"messages": USER, "max_tokens": 1}
    for name in ("gpt-4", "TINY", "", "../../etc/passwd"):
        error = refusal(client.post(CHAT, json=body | {"model": name}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert error["message"].endswith("this is tiny")
    for name in ("tiny", None):
        assert client.post(CHAT, json=body | {"model": name}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt": "x" * CONTEXT, "max_tokens": 1}, "prompt"),
        (COMPLETIONS, {"prompt": "x" * (CONTEXT - 2), "max_tokens": 3}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", "x" * CONTEXT]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [1] * CONTEXT, "echo": True, "max_tokens": 0}, None),
        (CHAT, {"messages": USER, "max_tokens": CONTEXT}, "messages"),
        (CHAT, {"messages": USER, "max_completion_tokens": CONTEXT}, "messages"),
        (CHAT, {"messages": USER * 1000}, "messages"),
    ],
)
def test_the_context_is_said_in_numbers_before_a_stream_begins(
    client: httpx2.Client, path: str, fields: dict[str, Any], param: str | None, stream: bool
) -> None:
    error = refusal(client.post(path, json=fields | {"stream": stream}), 400)
    if param is not None:
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        start = f"This model's maximum context length is {CONTEXT} tokens. However, you requested "
        unread = "the chat template writes more than the context can hold"
        assert error["message"].startswith((start, unread)) and len(error["message"]) < 250


def test_a_prompt_may_fill_the_context_to_the_last_token(client: httpx2.Client) -> None:
    body = {"prompt": "x" * (CONTEXT - 2), "max_tokens": 2, "ignore_eos": True}
    response = client.post(COMPLETIONS, json=body).json()
    assert response["usage"]["total_tokens"] == CONTEXT
    body = {"prompt": "x" * (CONTEXT - 2), "ignore_eos": True}  # 16 are the server's wish only
    assert client.post(COMPLETIONS, json=body).json()["usage"]["total_tokens"] == CONTEXT


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], []]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [[1], [-1]]}, "prompt[1][0]"),
        (COMPLETIONS, {"prompt": [1, 10**6]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": ["a"] * 1000, "n": 2}, "n"),
        (COMPLETIONS, {"prompt": [[1] * 200] * 1000, "echo": True, "logprobs": 20}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"258": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "stop_token_ids": [10**6]}, "stop_token_ids"),
        (COMPLETIONS, {"prompt": "a", "priority": 2**40}, "priority"),
        (COMPLETIONS, {"prompt": "a", "bad_words": ["  "]}, None),
        (CHAT, {"messages": USER, "chat_template_kwargs": {"x" * 9999: 1}}, "chat_template_kwargs"),
        (CHAT, {"messages": USER, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        (
            CHAT,
            {"messages": USER, "chat_template_kwargs": {"variables": 1}},
            "chat_template_kwargs",
        ),
        (CHAT, {"messages": USER, **dict.fromkeys(BOTH, True)}, "continue_final_message"),
        (CHAT, {"messages": USER, "n": 2, "temperature": 0}, "n"),
        (CHAT, {"messages": USER, "guided_regex": "(?<=a)b"}, "guided_regex"),
        (CHAT, {"messages": USER, "response_format": schema({"$ref": "#/none"})}, FORM),
        (COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "["}}, "structured_outputs"),
        (COMPLETIONS, {"prompt": "a", "response_format": schema({"type": "foo"})}, FORM),
    ],
)
def test_what_only_this_model_cannot_do_is_refused_too(
    client: httpx2.Client, path: str, fields: dict[str, Any], param: str | None
) -> None:
    for stream in (False, True):
        error = refusal(client.post(path, json=fields | {"stream": stream}), 400)
        assert error["param"] == param and error["code"] is None and len(error["message"]) < 500


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_form_cannot_go_on_is_an_error(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    accept, left, heard = GrammarMatcher.accept, [True] * 6 if stream else [], threading.Event()

    def fail(self: GrammarMatcher, token: int) -> bool:
        if not left:
            assert heard.wait(30)
            raise RequestError("the structured output cannot go on")
        left.pop()
        return accept(self, token)

    monkeypatch.setattr(GrammarMatcher, "accept", fail)
    body = {"prompt": "a", "guided_regex": "a{12,}", "stream": stream}
    response = heard_from(client, body, heard)
    if stream:
        *pieces, error, done, _ = response.text.split("\n\n")
        assert pieces and done == "data: [DONE]"
        assert error.startswith('data: {"error":{"message":"the structured output cannot go on"')
    else:
        assert refusal(response, 400)["param"] == "guided_regex"


def test_an_answer_goes_on_from_a_message_left_open(client: httpx2.Client, llm: AsyncLLM) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    tokenizer, greedy = llm.get_tokenizer(), {"temperature": 0, "max_tokens": 6}
    ids = tokenizer.apply_chat_template(messages, continue_final_message=True)
    assert tokenizer.decode(ids).endswith("Well, ")
    expected = client.post(COMPLETIONS, json={"prompt": ids, **greedy}).json()
    body = {"messages": messages, "continue_final_message": True, **greedy}
    found = client.post(CHAT, json=body).json()
    assert found["choices"][0]["message"]["content"] == expected["choices"][0]["text"]
    assert found["usage"]["prompt_tokens"] == len(ids)


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, chat=False)
    llm = AsyncLLM(str(folder), max_num_seqs=1)
    try:
        with serving(llm) as url:
            response = httpx2.post(url + CHAT, json={"messages": USER})
            message = refusal(response, 400)["message"]
            assert "has no chat template; send text to /v1/completions" in message
            assert httpx2.post(url + COMPLETIONS, json={"prompt": "a"}).status_code == 200
    finally:
        llm.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step_is_500_or_an_event_and_the_next_request_runs(
    client: httpx2.Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    body = {"prompt": "Hello", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    right = client.post(COMPLETIONS, json=body).json()["choices"]
    run, left, heard = ModelRunner.run, [True] * 6 if stream else [], threading.Event()

    def fail(self: ModelRunner, *arguments: Any) -> Any:
        if not left:
            assert heard.wait(30)
            raise RuntimeError("at 0xdeadbeef in /home/ann")
        left.pop()
        return run(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", fail)
        response = heard_from(client, body | {"stream": stream}, heard)
    assert "0xdeadbeef" not in response.text and "/home" not in response.text
    if stream:
        events = response.text.split("\n\n")
        assert response.status_code == 200 and len(events) > 3
        assert events[-3].startswith('data: {"error":{') and events[-2:] == ["data: [DONE]", ""]
    else:
        assert refusal(response, 500)["type"] == "server_error"
    assert client.post(COMPLETIONS, json=body).json()["choices"] == right
