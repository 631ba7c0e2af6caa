"""What is refused before a route sees it: no key, headers and bodies too large, and bodies that do not come."""

import asyncio
import hmac
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from .errors import error_response

OPEN_PATHS = ("/health", "/version", "/metrics", "/", "/openapi.json")


@dataclass(frozen=True)
class Limits:
    """api_keys: one of these must come with every request but those for OPEN_PATHS, if there are any. max_body,
    max_headers: bytes. receive_timeout: seconds in which headers must come, and then the body. timeout: seconds that a
    request may take, None for any number."""

    api_keys: tuple[str, ...] = ()
    max_body: int = 4 << 20
    max_headers: int = 32 << 10
    receive_timeout: float = 60.0
    timeout: float | None = None


class Guard:
    """ASGI middleware. The path is the scope's, which no header changes; keys are compared in constant time."""

    def __init__(self, app: Any, limits: Limits):
        self._app, self._limits = app, limits
        self._keys = [key.encode() for key in limits.api_keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal:
            await error_response(*refusal)(scope, receive, send)
        else:
            await self._app(scope, _Body(receive, self._limits), send)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        """Status and message."""
        limits, headers = self._limits, dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > limits.max_headers:
            return 431, f"accepted: headers of up to {limits.max_headers} bytes"
        if self._keys and scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            return 401, "a valid API key is needed"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > limits.max_body:
            return 413, _too_large(limits)
        return None

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        found = [hmac.compare_digest(key, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(found)


class _Body:
    """A request's body as it comes; an HTTPException where it gets too large, or has not ended in time."""

    def __init__(self, receive: Any, limits: Limits):
        self._receive, self._limits = receive, limits
        self._size, self._ended = 0, False
        self._deadline = asyncio.get_running_loop().time() + limits.receive_timeout

    async def __call__(self) -> Any:
        if self._ended:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, "the body did not come in time", {"Connection": "close"}) from error
        self._size += len(message.get("body", b""))
        self._ended = not message.get("more_body")
        if self._size > self._limits.max_body:
            raise HTTPException(413, _too_large(self._limits))
        return message


def _too_large(limits: Limits) -> str:
    return f"accepted: bodies of up to {limits.max_body} bytes"
