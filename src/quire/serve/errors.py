"""What went wrong, in the JSON that clients of OpenAI's API read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from quire.errors import ArgumentError, UnsupportedError

logger = logging.getLogger("uvicorn.error")  # where the server's own lines go

_CLIENT_LEFT = 499  # as nginx calls it; nobody reads it
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: of HTTP.
        message: a sentence.
        code: a word that programs look for.
        param: the field of the body that is wrong.
        headers: sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers


class Json(Response):
    """A JSON answer in ASCII, which also holds text that UTF-8 cannot, as half of a surrogate pair."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def error_object(refusal: Refusal) -> dict[str, Any]:
    """The body of an answer that says what went wrong."""
    kind = _KINDS.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}}


def refused(refusal: Refusal) -> Json:
    """The answer of a request that is not served."""
    return Json(error_object(refusal), refusal.status, refusal.headers)


def as_refusal(error: Exception) -> Refusal:
    """What a client is told about an exception: its own mistakes by name, the server's without their details."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, (ArgumentError, UnsupportedError)):
        return Refusal(400, str(error))
    logger.error("a request failed", exc_info=error)
    return Refusal(500, "the request could not be served. Fix: see the server's log")


def say_errors(app: FastAPI) -> None:
    """Let every failure of an app be answered in OpenAI's JSON."""
    for kind in (Refusal, ArgumentError, UnsupportedError, Exception):
        app.add_exception_handler(kind, _on_failure)
    app.add_exception_handler(RequestValidationError, _on_wrong_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_client_left)


async def _on_failure(request: Request, error: Exception) -> Response:
    return refused(as_refusal(error))


async def _on_wrong_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return refused(
            Refusal(400, f"the body must be JSON; got {first['ctx']['error']}. Fix: see the request")
        )
    if first["type"] in ("model_type", "model_attributes_type") and len(first["loc"]) == 1:
        said = "the body must be a JSON object, with the header content-type: application/json; got another"
        return refused(Refusal(400, f"{said}. Fix: both"))
    # Names of a union's members and of validators are ours, not the client's.
    places = [str(part) for part in first["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
    name = ".".join(places) or None
    reason = str(first["msg"]).removeprefix("Value error, ")
    message = reason if "Fix: " in reason else f"{name or 'the body'}: {reason}. Fix: see the API's reference"
    return refused(Refusal(400, message, param=name))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{error.detail}: {request.method} {request.url.path}"
    return refused(Refusal(error.status_code, said, headers=error.headers))


async def _on_client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)
