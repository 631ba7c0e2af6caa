"""Errors as clients see them, in OpenAI's shape."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from .async_engine import EngineDeadError, QueueFullError


class UnknownModelError(ValueError):
    """A request names a model that is not served here."""


class ClientGoneError(Exception):
    """Nobody waits for the response any more."""


STATUS = {UnknownModelError: 404, QueueFullError: 503, EngineDeadError: 500, asyncio.TimeoutError: 504}
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}
MAX_MESSAGE, MAX_PARAM = 500, 100  # characters, of which some come from the request


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    param = None if param is None else _shown(param, MAX_PARAM)
    return {"error": {"message": _shown(message, MAX_MESSAGE), "type": kind, "param": param, "code": status}}


def error_response(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    retry = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse(error_body(status, message, param), status, {**retry, **(headers or {})})


def _shown(text: str, most: int) -> str:
    """Its beginning, as valid Unicode: JSON can spell half a surrogate pair, which no response can be encoded with."""
    return text[:most].encode(errors="replace").decode()


def body_of(error: Exception) -> dict[str, Any]:
    """Of any error: nothing is told of one that the server did not expect. The field is the one that a message begins
    with, as in `n=0; accepted: ...`."""
    status = status_of(error)
    message = "the request took too long" if status == 504 else str(error)
    if status == 500 and not isinstance(error, EngineDeadError):
        message = "internal error"
    name, equals, _ = message.partition("=")
    return error_body(status, message, name if equals and name.isidentifier() else None)


def status_of(error: Exception) -> int:
    """ValueErrors are the client's, others the server's."""
    known = next((status for kind, status in STATUS.items() if isinstance(error, kind)), None)
    return known or (400 if isinstance(error, ValueError | TypeError) else 500)
