"""`pagedjax serve`: the application on a socket, from the ready line to the last response."""

import gc
import json
import logging
import time
from typing import Any

import uvicorn

from pagedjax.llm import LLM

from .app import make_app
from .async_engine import AsyncEngine, Stream, Watcher
from .connections import make_config
from .guard import Limits
from .metrics import Metrics
from .serving import ChatSettings

logger = logging.getLogger("pagedjax.requests")


class RequestLog(Watcher):
    """A line for every request that has ended, without a word of it."""

    def __init__(self, as_json: bool):
        self._as_json = as_json

    def ended(self, stream: Stream) -> None:
        requests = stream.requests
        if not requests:
            logger.info("request %s was refused: %s", stream.request_id, type(stream.error).__name__)
            return
        metrics = stream.first.metrics
        line: dict[str, Any] = {
            "request": stream.request_id,
            "prompt_tokens": len(stream.first.prompt_token_ids),
            "output_tokens": sum(len(request.output_token_ids) for request in requests),
            "ttft_s": None if metrics.first_token is None else round(metrics.first_token - metrics.arrival, 4),
            "total_s": round(time.perf_counter() - metrics.arrival, 4),
            "finish_reason": ",".join(request.finish_reason or "abort" for request in requests),
        }
        text = json.dumps(line) if self._as_json else " ".join(f"{name}={value}" for name, value in line.items())
        logger.info("%s", text)


class Server(uvicorn.Server):
    """Says when it is ready, and where: with port 0 the system has chosen."""

    async def startup(self, sockets: Any = None) -> None:
        gc.collect()
        gc.freeze()  # what the model and its libraries have made stays: no collection while serving need look at it
        await super().startup(sockets)
        for server in getattr(self, "servers", []):
            host, port = server.sockets[0].getsockname()[:2]
            print(f"pagedjax: ready on http://{host}:{port}", flush=True)

    def port(self) -> int:
        """Of a server in another thread, once it is ready."""
        while not self.started:
            if self.should_exit:
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        return self.servers[0].sockets[0].getsockname()[1]


def make_server(
    llm: LLM,
    model: str,
    limits: Limits,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    max_requests: int = 1024,
    log_requests: bool = False,
    log_json: bool = False,
    chat: ChatSettings | None = None,
) -> tuple[Server, AsyncEngine]:
    """The application of an engine on a socket, not yet running."""
    metrics = Metrics(llm.engine)
    watchers: list[Watcher] = [metrics]
    if log_requests:
        watchers.append(RequestLog(log_json))
    engine = AsyncEngine(llm, max_requests, watchers)
    app = make_app(engine, metrics, model, limits, chat)
    return Server(make_config(app, limits, host=host, port=port)), engine


def serve(llm: LLM, model: str, limits: Limits, **options: Any) -> int:
    """Serves until SIGTERM or Ctrl-C; then takes no more requests, and ends when those under way have. `options` are
    `make_server`'s."""
    server, engine = make_server(llm, model, limits, **options)
    server.run()
    return 1 if engine.error else 0
