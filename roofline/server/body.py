"""The bytes of a request's body, up to a strict JSON object; no meaning of any field.

What is wrong with the transport is an HTTPException with its status, what is wrong with the JSON a
RequestError.
"""

import asyncio
import collections
import json
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from roofline.errors import RequestError, shown

MAX_BODY_BYTES = 8 << 20  # a million tokens as text or as ids
_RECEIVE_S = 60.0  # for the whole body, however slowly it comes


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object a request carries."""
    kind, _, _ = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":  # a web page may send others unasked
        raise HTTPException(415, f"Content-Type is {shown(kind)}; it must be application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Content-Encoding is not supported; send the body as it is")
    try:
        async with asyncio.timeout(_RECEIVE_S):
            return parse_json(await _read(request))
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive in {_RECEIVE_S:g} s") from None


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8: finite numbers, whole characters, no key twice, no abyss."""
    try:
        found = msgspec.json.decode(body)
        json.loads(body, object_pairs_hook=_unique)  # msgspec takes the last of two equal keys
    except (msgspec.MsgspecError, ValueError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise RequestError("the body is not valid JSON: it is nested too deeply") from None
    if not isinstance(found, dict):
        raise RequestError(f"the body is {shown(found)}; it must be a JSON object")
    return found


async def _read(request: Request) -> bytes:
    """The body, counted as it comes: what its header says of its length proves nothing."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


def _unique(pairs: list[tuple[str, Any]]) -> None:
    """Refuse an object with a key that comes twice, which readers take apart; keep nothing."""
    keys = collections.Counter(key for key, _ in pairs)
    if len(keys) < len(pairs):
        ((key, _),) = keys.most_common(1)
        raise ValueError(f"duplicate key {shown(key)}")
