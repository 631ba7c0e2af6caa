"""What is refused before a route sees it: no key, and bodies that are too large."""

import hmac
import json
from dataclasses import dataclass
from typing import Any

OPEN_PATHS = ("/health", "/version", "/metrics", "/", "/openapi.json")


@dataclass(frozen=True)
class Limits:
    """api_keys: one of these must come with every request but those for OPEN_PATHS, if there are any. max_body,
    max_headers: bytes. timeout: seconds that a request may take, None for any number."""

    api_keys: tuple[str, ...] = ()
    max_body: int = 4 << 20
    max_headers: int = 32 << 10
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
        headers = dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._limits.max_headers:
            await _refuse(send, 431, "BadRequestError", f"accepted: headers of up to {self._limits.max_headers} bytes")
            return
        if self._keys and scope["path"] not in OPEN_PATHS and not self._knows(headers.get(b"authorization", b"")):
            await _refuse(send, 401, "AuthenticationError", "a valid API key is needed")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limits.max_body:
            await _refuse(send, 413, "RequestTooLargeError", f"accepted: bodies of up to {self._limits.max_body} bytes")
            return
        await self._app(scope, _Counted(receive, self._limits.max_body), send)

    def _knows(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        found = [hmac.compare_digest(key, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(found)


class _Counted:
    """A body that ends, as if the client had left, where it gets too large."""

    def __init__(self, receive: Any, room: int):
        self._receive, self._room = receive, room

    async def __call__(self) -> Any:
        message = await self._receive()
        self._room -= len(message.get("body", b""))
        return message if self._room >= 0 else {"type": "http.disconnect"}


async def _refuse(send: Any, status: int, kind: str, message: str) -> None:
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
