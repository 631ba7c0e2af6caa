"""uvicorn's faster HTTP/1.1 protocol, with the bound that it lacks.

What has come of a request's head, or of the trailers behind its body, is kept until all of it is there.
`h11_max_incomplete_event_size` bounds it here as it does in uvicorn's other protocol.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class BoundedHttp(HttpToolsProtocol):
    """Ends a connection by which too much has come that is neither a whole head nor a body."""

    _unfinished = 0  # bytes
    _advanced = False

    def data_received(self, data: bytes) -> None:
        self._advanced = False
        super().data_received(data)
        self._unfinished = 0 if self._advanced else self._unfinished + len(data)
        if self._unfinished > (self.config.h11_max_incomplete_event_size or 0) and not self.transport.is_closing():
            self.send_400_response("The request's head is too large.")

    def on_headers_complete(self) -> None:
        self._advanced = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._advanced = True
        super().on_message_complete()
