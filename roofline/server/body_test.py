import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from roofline.errors import RequestError
from roofline.server import body
from roofline.server.body import MAX_BODY_BYTES, parse_json, read_json


def request(chunks: Iterable[bytes], *, wait_s: float = 0, **headers: str) -> Request:
    """A request whose body comes in chunks."""
    left = iter([*chunks])

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(wait_s)
        chunk = next(left, None)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    sent = {"content_type": "application/json", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in sent.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def test_an_object_comes_whole_from_any_chunks() -> None:
    chunks = [bytes([byte]) for byte in '{"é": [1, 2.5, null, "\\ud83d\\ude00"]}'.encode()]
    assert asyncio.run(read_json(request(chunks))) == {"é": [1, 2.5, None, "😀"]}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'"text"',
        b"null",
        b'{"a": 1',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1} trailing',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": 1, "b": {"c": 1, "c": 2}}',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b'{"a":' * 100_000,
        b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_what_readers_of_json_take_apart_is_refused(text: bytes) -> None:
    with pytest.raises(RequestError, match="the body is") as refused:
        parse_json(text)
    assert len(refused.value.message) < 200


def test_a_duplicate_key_is_named() -> None:
    with pytest.raises(RequestError, match="duplicate key 'seed'"):
        parse_json(b'{"seed": 1, "seed": 2}')


def test_the_size_is_counted_and_not_believed() -> None:
    chunks = [b"x" * (1 << 20)] * ((MAX_BODY_BYTES >> 20) + 1)
    with pytest.raises(HTTPException) as refused:
        asyncio.run(read_json(request(chunks, content_length="2")))
    assert refused.value.status_code == 413


def test_a_body_that_comes_too_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_RECEIVE_S", 0.05)
    with pytest.raises(HTTPException) as refused:
        asyncio.run(read_json(request([b" "] * 100, wait_s=0.02)))
    assert refused.value.status_code == 408


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/plain"},
        {"content_type": ""},
        {"content_type": "multipart/form-data"},
        {"content_encoding": "gzip"},
    ],
)
def test_only_json_as_it_is(headers: dict[str, str]) -> None:
    with pytest.raises(HTTPException) as refused:
        asyncio.run(read_json(request([b"{}"], wait_s=0, **headers)))
    assert refused.value.status_code == 415


def test_a_charset_beside_the_type_is_no_matter() -> None:
    sent = request([b"{}"], content_type="Application/JSON; charset=utf-8")
    assert asyncio.run(read_json(sent)) == {}
