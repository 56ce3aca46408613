"""Errors as OpenAI's clients read them: a status, and one envelope whatever went wrong.

What a failure of ours says stays in the log: it may name what is nobody's business.
"""

from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from roofline.errors import CapacityError, EngineError, RequestError, UsageError

_STATUS = {"model_not_found": 404}  # of a code; 400 of the others


def of(error: Exception) -> Response:
    """The response that tells an error."""
    if isinstance(error, RequestError):
        status = _STATUS.get(error.code or "", 400)
        return _response(status, error.message, error.param, error.code)
    if isinstance(error, (UsageError, CapacityError)):
        return _response(400, error.message)
    if isinstance(error, HTTPException):
        return _response(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, EngineError):
        return _response(500, "the engine failed while it answered; the request may be sent again")
    return _response(500, "the server failed on this request")


def _response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    content = msgspec.json.encode({"error": error})
    return Response(content, status, headers=headers, media_type="application/json")
