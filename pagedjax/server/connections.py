"""Connections: how uvicorn reads requests, how much of one it keeps, and how long it waits."""

from asyncio import TimerHandle
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .guard import Limits


def make_config(app: Any, limits: Limits, **more: Any) -> uvicorn.Config:
    """uvicorn's settings. There are no WebSockets here."""

    class Connection(BoundedConnection):
        seconds, max_headers = limits.receive_timeout, limits.max_headers

    return uvicorn.Config(
        app,
        loop="asyncio",  # which lets the engine's thread have its turn at every write
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        **more,
    )


class BoundedConnection(HttpToolsProtocol):
    """Is closed when the headers of a request, the first or a later one, are too many or have taken too long, and when
    a body still comes so long after the response: httptools bounds none of this."""

    seconds: float
    max_headers: int  # bytes, of trailers too
    _timer: TimerHandle | None = None
    _unfinished = 0  # bytes that are neither a whole head nor a body
    _advanced = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._advanced = False
        super().data_received(data)
        self._unfinished = 0 if self._advanced else self._unfinished + len(data)
        if self._unfinished > self.max_headers and not self.transport.is_closing():
            self.send_400_response("The request's head is too large.")
        self._watch()

    def on_headers_complete(self) -> None:
        self._advanced = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._advanced = True
        super().on_message_complete()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self.seconds, self.transport.close)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
