import json

import pytest
from starlette.exceptions import HTTPException

from roofline.errors import (
    CapacityError,
    EngineError,
    RequestError,
    UnsupportedError,
)
from roofline.server import envelope


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (RequestError("no", param="n"), 400, "n", None),
        (RequestError("no", code="context_length_exceeded"), 400, None, "context_length_exceeded"),
        (RequestError("no", code="model_not_found"), 404, None, "model_not_found"),
        (UnsupportedError("no"), 400, None, None),
        (CapacityError("no"), 400, None, None),
        (HTTPException(405, "no", {"allow": "POST"}), 405, None, None),
        (EngineError("no"), 500, None, None),
        (KeyError("no"), 500, None, None),
    ],
)
def test_every_error_is_one_envelope(
    error: Exception, status: int, param: str | None, code: str | None
) -> None:
    response = envelope.of(error)
    assert response.status_code == status
    assert response.media_type == "application/json"
    (content,) = json.loads(bytes(response.body)).values()
    assert list(content) == ["message", "type", "param", "code"]
    kind = "server_error" if status == 500 else "invalid_request_error"
    assert (content["type"], content["param"], content["code"]) == (kind, param, code)
    assert content["message"] == "no" or status == 500


def test_headers_of_the_framework_stay() -> None:
    response = envelope.of(HTTPException(405, "no", {"allow": "POST"}))
    assert response.headers["allow"] == "POST"


def test_what_failed_inside_is_not_told() -> None:
    for error in (EngineError("/home/ann/model at 0x7f"), OSError("/etc/passwd")):
        body = bytes(envelope.of(error).body)
        assert b"/" not in json.loads(body)["error"]["message"].encode() and b"0x" not in body
