"""The server as clients use it: the openai SDK, many at once, leaving early, sending anything."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from roofline import LLM, SamplingParams
from roofline.async_llm import AsyncLLM
from roofline.execution.runner import ModelRunner
from tests.serving import serving
from tests.tiny_model import write_tiny_model

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER: Any = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
LONG: dict[str, Any] = {"prompt": "Hello", "max_tokens": 3000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), context=4096)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[AsyncLLM]:
    door = AsyncLLM(str(folder), max_num_seqs=8)
    yield door
    door.close()


@pytest.fixture(scope="module")
def url(llm: AsyncLLM) -> Iterator[str]:
    with serving(llm) as url:
        yield url


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def wait_until_idle(llm: AsyncLLM) -> None:
    """Nothing runs or waits, and no block is held."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        stats = llm.stats()
        if stats["num_running"] == stats["num_waiting"] == stats["num_used_blocks"] == 0:
            return
        time.sleep(0.01)
    raise AssertionError(llm.stats())


def test_the_sdk_streams_what_it_gets_whole(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(model="tiny", messages=USER, **GREEDY)
    stream = sdk.chat.completions.create(
        model="tiny",
        messages=USER,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    first, *chunks, last = stream
    assert first.choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in [first, *chunks]]
    assert reasons == [None] * len(chunks) + [whole.choices[0].finish_reason]
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert len({(c.id, c.created, c.model) for c in [first, *chunks, last]}) == 1


def test_the_sdk_reads_answers_without_repair(url: str) -> None:
    """Validated strictly: the SDK itself takes whatever comes."""
    body = {"messages": USER, "logprobs": True, "top_logprobs": 2, "n": 2, "max_tokens": 3}
    raw = httpx2.post(url + CHAT, json=body).json()
    assert ChatCompletion.model_validate(raw, strict=False).to_dict(mode="json") == raw
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    for event in httpx2.post(url + CHAT, json=body).text.split("\n\n")[:-2]:
        raw = json.loads(event.removeprefix("data: "))
        assert ChatCompletionChunk.model_validate(raw).to_dict(mode="json") == raw
    raw = httpx2.post(url + COMPLETIONS, json={"prompt": "a", "logprobs": 2, "echo": True}).json()
    raw["choices"][0]["logprobs"]["token_logprobs"][0] = 0.0  # typed so, though it never is
    raw["choices"][0]["logprobs"]["top_logprobs"][0] = {}
    assert Completion.model_validate(raw).to_dict(mode="json") == raw


def test_n_and_several_prompts_are_choices_in_order(sdk: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "seed": 3, "n": 2}
    whole = sdk.completions.create(prompt=["One", "Two"], **asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    pieces = dict.fromkeys(range(4), "")
    for chunk in sdk.completions.create(prompt=["One", "Two"], stream=True, **asked):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert [*pieces.values()] == [choice.text for choice in whole.choices]
    assert len(set(pieces.values())) > 1
    alone = sdk.completions.create(prompt="Two", **asked)
    assert [choice.text for choice in alone.choices] == [c.text for c in whole.choices[2:]]


def test_an_echo_is_the_prompt_and_its_scores(sdk: openai.OpenAI, folder: Path) -> None:
    asked: dict[str, Any] = {"model": "tiny", "echo": True, "logprobs": 1, "temperature": 0}
    (scored,) = sdk.completions.create(prompt="Hello", max_tokens=0, **asked).choices
    (longer,) = sdk.completions.create(prompt="Hello", max_tokens=3, **asked).choices
    assert scored.text == "Hello" and longer.text.startswith("Hello")
    assert scored.logprobs is not None and longer.logprobs is not None
    found = scored.logprobs.token_logprobs or []
    assert len(found) == 5 and (longer.logprobs.token_logprobs or [])[:5] == found
    with LLM(str(folder)) as llm:
        ids = llm.get_tokenizer().encode("Hello")
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        (output,) = llm.generate([ids], params)
    entries = zip(ids[1:], (output.prompt_logprobs or [])[1:], strict=True)
    assert found == [None, *(entry[id].logprob for id, entry in entries if entry is not None)]
    text, offsets = longer.text, longer.logprobs.text_offset or []
    pieces = [text[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)]
    assert pieces == longer.logprobs.tokens


def test_answers_have_the_form_that_was_asked_for(sdk: openai.OpenAI) -> None:
    properties = {"ok": {"type": "boolean"}, "size": {"enum": [1, 2]}}
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": ["ok"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: dict[str, Any] = {"model": "tiny", "messages": USER, "seed": 1, "max_tokens": 1000}
    pieces = ["", "", ""]
    for chunk in sdk.chat.completions.create(response_format=form, n=3, stream=True, **asked):
        (choice,) = chunk.choices
        pieces[choice.index] += choice.delta.content or ""
    whole = sdk.chat.completions.create(response_format=form, n=3, **asked)
    assert [choice.message.content for choice in whole.choices] == pieces
    for text in pieces:
        jsonschema.validate(json.loads(text), schema)
    choice: Any = {"structured_outputs": {"choice": ["Paris", "Rome"]}}
    one = sdk.chat.completions.create(extra_body=choice, **asked).choices[0]
    assert one.message.content in ("Paris", "Rome") and one.finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(extra_body={"guided_regex": "(("}, **asked)
    assert refused.value.param == "guided_regex"


def test_errors_are_the_sdks_own(sdk: openai.OpenAI) -> None:
    create = sdk.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="tiny", messages=USER, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        create(model="tiny", messages=USER, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="tiny", messages=USER, max_tokens=5000)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-4", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("gpt-4")
    assert [model.id for model in sdk.models.list()] == [sdk.models.retrieve("tiny").id]


def test_eight_streams_at_once_are_the_eight_alone(sdk: openai.OpenAI) -> None:
    def streamed(index: int) -> str:
        stream = sdk.completions.create(
            model="tiny", prompt=f"Prompt {index}", max_tokens=24, seed=index, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    alone = [streamed(index) for index in range(8)]
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: together.update({i: streamed(i)})) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[index] for index in range(8)] == alone


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_what_was_held(
    url: str, llm: AsyncLLM, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ModelRunner.run

    def slow_step(*plan: Any) -> Any:  # so slow that no request ends by itself before its client
        time.sleep(0.01)
        return step(*plan)

    monkeypatch.setattr(ModelRunner, "run", slow_step)
    body = {"prompt": ["Hello"] * 3, "max_tokens": 3000, "ignore_eos": True, "stream": stream}
    generated = llm.stats()["generation_tokens"]
    with httpx2.Client(base_url=url) as client:
        if stream:
            with client.stream("POST", COMPLETIONS, json=body) as response:
                lines = response.iter_lines()  # kept: the response is closed with it
                assert next(lines).startswith("data: ")
                assert llm.stats()["num_used_blocks"] > 0
        else:
            with pytest.raises(httpx2.TimeoutException):
                client.post(COMPLETIONS, json=body, timeout=0.5)
    wait_until_idle(llm)
    assert llm.stats()["generation_tokens"] - generated < 3 * 3000


def test_who_stops_reading_is_left(
    url: str, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roofline.server.stream.STALL_S", 0.2)
    body = json.dumps(
        {"prompt": ["x"] * 8, "max_tokens": 3500, "ignore_eos": True, "stream": True}
        | {"logprobs": 20}
    ).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        while not llm.stats()["num_used_blocks"]:
            time.sleep(0.01)
        wait_until_idle(llm)
        assert llm.stats()["num_used_blocks"] == 0


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_who_sends_a_head_without_end_is_left(
    url: str, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    monkeypatch.setattr("roofline.server.listening._HEAD_S", 0.5)
    host, port = url.removeprefix("http://").split(":")
    started = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        sock.sendall(before)
        assert not before or sock.recv(65536).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(OSError):  # the server has left
            for _ in range(600):
                sock.sendall(b"G")
                time.sleep(0.05)
        assert 0.5 <= time.monotonic() - started < 20


NAMES = ["messages", "prompt", "model", "n", "temperature", "top_p", "top_k", "stop", "seed"]
NAMES += ["logit_bias", "logprobs", "top_logprobs", "stream", "stream_options", "echo", "tools"]
NAMES += ["max_tokens", "min_tokens", "response_format", "chat_template_kwargs", "user", "zzz"]
NAMES += ["structured_outputs", "guided_json", "guided_choice"]
SCALARS = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats()
SCALARS |= st.text(max_size=8) | st.sampled_from(["user", "system", "<|im_end|>", "tiny", "text"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1", "json"]), inner)
    ),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client


def canary(client: httpx2.Client) -> Any:
    """A good request, whose answer is known."""
    body = {"messages": USER, "temperature": 0, "max_tokens": 4}
    return client.post(CHAT, json=body).json()["choices"]


@pytest.fixture(scope="module")
def known(client: httpx2.Client) -> Any:
    return canary(client)


@given(body=BODIES | VALUES, sound=st.booleans(), path=st.sampled_from([CHAT, COMPLETIONS]))
@settings(max_examples=100)
def test_any_json_is_answered_or_refused_in_the_envelope(
    client: httpx2.Client, known: Any, body: Any, sound: bool, path: str
) -> None:
    if sound and isinstance(body, dict):  # what else there is meets a request that would run
        body = {"messages": USER} | body if path == CHAT else {"prompt": "Hello"} | body
        body = body | {"max_tokens": 2}
    text = json.dumps(body)  # which says Infinity, as the client's own encoder does not
    response = client.post(path, content=text, headers={"content-type": "application/json"})
    if response.status_code == 200:
        assert response.text.startswith(("data: ", '{"id":'))
    else:
        assert 400 <= response.status_code < 500
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and len(response.text) < 2000
    assert canary(client) == known


RAW = [
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"x" * 200_000 + b"\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    b"GET /\x00 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /health\r\n\r\n",
]


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
def test_bytes_that_are_no_request_hurt_nobody(
    url: str, client: httpx2.Client, known: Any, data: bytes
) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sock:
        answer = b""
        with contextlib.suppress(OSError):  # the server may have left already
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while chunk := sock.recv(65536):
                answer += chunk
    assert answer[:10] in (b"", b"HTTP/1.1 4") and b"Traceback" not in answer
    assert canary(client) == known


def test_smollm2_streams_to_the_sdk_what_python_gets(smollm2_path: Path) -> None:
    messages: Any = [{"role": "user", "content": "🇫🇷 What is the capital of France?"}]
    params = SamplingParams(temperature=0, max_tokens=24)
    options: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 2}
    with LLM(str(smollm2_path), **options) as llm:
        (expected,) = llm.chat(messages, params)
    door = AsyncLLM(str(smollm2_path), **options)
    try:
        with (
            serving(door, "smollm2-135m") as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none") as sdk,
        ):
            stream = sdk.chat.completions.create(
                model="smollm2-135m", messages=messages, temperature=0, max_tokens=24, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    finally:
        door.close()
    assert text == expected.outputs[0].text and "Paris" in text


@pytest.fixture
def command(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """`roofline serve`, ready."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "roofline", "serve", str(folder), "--port", "0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "ROOFLINE_MAX_NUM_SEQS": "2"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ready(process: "subprocess.Popen[str]") -> str:
    """The URL of the one line it says."""
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.fullmatch(r"roofline: ready in [\d.]+ s: (http://127.0.0.1:\d+)/v1 .*\n", line)
    assert found, line
    return found[1]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_an_answer_finish_and_ends_in_one_line(
    command: "subprocess.Popen[str]", sent: signal.Signals
) -> None:
    url = ready(command)
    body = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", url + COMPLETIONS, json=body, timeout=60) as response:
        lines = response.iter_lines()
        first = next(lines)
        command.send_signal(sent)
        chunks = [line for line in (first, *lines) if line]
    assert chunks[-1] == "data: [DONE]"
    assert json.loads(chunks[-2][6:])["choices"][0]["finish_reason"]
    out, err = command.communicate(timeout=30)
    assert (command.returncode, out, err) == (130, "", "roofline: interrupted\n")


def test_a_second_signal_does_not_wait(command: "subprocess.Popen[str]") -> None:
    url = ready(command)
    body = {"prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", url + COMPLETIONS, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        command.send_signal(signal.SIGINT)
        time.sleep(0.3)
        command.send_signal(signal.SIGINT)
        rest = []
        with contextlib.suppress(httpx2.HTTPError):  # the server has left
            rest.extend(lines)
        _, err = command.communicate(timeout=60)
    assert command.returncode == 130 and err == "roofline: interrupted\n"
    assert "data: [DONE]" not in rest
