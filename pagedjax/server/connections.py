"""Connections: how uvicorn reads requests, and how long it waits for one."""

from asyncio import TimerHandle
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .guard import Limits


def make_config(app: Any, limits: Limits, **more: Any) -> uvicorn.Config:
    """uvicorn's settings. h11 is named since httptools, which would be taken where it is installed, bounds no headers;
    there are no WebSockets here."""

    class Connection(PromptConnection):
        seconds = limits.receive_timeout

    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=limits.max_headers,
        log_config=None,
        access_log=False,
        server_header=False,
        **more,
    )


class PromptConnection(H11Protocol):
    """Is closed when the headers of a request, the first or a later one, have taken too long, and when a body still
    comes so long after the response."""

    seconds: float
    _timer: TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE and self.conn.our_state is not h11.DONE:
            self._stop_watching()
        elif self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self.seconds, self.transport.close)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
