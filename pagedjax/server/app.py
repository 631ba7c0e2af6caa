"""The HTTP application: routes, and errors in OpenAI's shape."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pagedjax import __version__

from . import document
from .answers import Answer, Generated
from .async_engine import AsyncEngine, EngineDeadError, QueueFullError
from .bodies import BoundedRoute
from .errors import ClientGoneError, body_of, error_response, status_of
from .guard import OPEN_PATHS, Guard, Limits
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest
from .serving import ChatSettings, Serving

logger = logging.getLogger(__name__)

# The page takes nothing from elsewhere, and talks to no other server.
CONTENT_POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
PAGE = files("pagedjax.server") / "static" / "index.html"


class Streamed(StreamingResponse):
    """Whose iterator is closed, and so the request aborted, as soon as the client has left."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # pyright: ignore[reportAttributeAccessIssue]


class Served(NamedTuple):
    """What the routes of one application answer from."""

    serving: Serving
    metrics: Metrics
    limits: Limits
    created: int  # seconds since 1970

    @property
    def max_model_len(self) -> int:
        return self.serving.engine.llm.engine.config.max_model_len


def make_app(
    engine: AsyncEngine, metrics: Metrics, model: str, limits: Limits, chat: ChatSettings | None = None
) -> FastAPI:
    """The routes of one engine, which serves `model`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    pages = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}  # a redirect would go where Host says
    app = FastAPI(title="pagedjax", version=__version__, lifespan=lifespan, **pages)
    app.state.served = Served(Serving(engine, model, chat or ChatSettings()), metrics, limits, int(time.time()))
    app.include_router(router)
    _add_errors(app)
    document.describe(app, OPEN_PATHS)
    app.add_middleware(Guard, limits=limits)
    return app


async def served_by(request: Request) -> Served:
    return request.app.state.served


# FastAPI keeps every function that it has seen behind a route, so that one which held an engine would keep its memory.
From = Annotated[Served, Depends(served_by)]
router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/completions", responses=document.body(document.CompletionBody, "text/event-stream"))
async def completions(request: Request, body: CompletionRequest, served: From) -> Response:
    return await answer(request, served, body.stream, await served.serving.completion(body))


@router.post("/v1/chat/completions", responses=document.body(document.ChatBody, "text/event-stream"))
async def chat_completions(request: Request, body: ChatRequest, served: From) -> Response:
    return await answer(request, served, body.stream, await served.serving.chat(body))


@router.post("/generate", responses=document.body(document.GenerateBody, "application/x-ndjson"))
async def generate(request: Request, body: GenerateRequest, served: From) -> Response:
    return await answer(request, served, body.stream, await served.serving.generate(body))


async def answer(request: Request, served: Served, stream: bool, reply: Answer | Generated) -> Response:
    """Streamed, or whole, unless the client leaves or its time is over."""
    timeout = served.limits.timeout
    if stream:
        await reply.begin()
        return Streamed(reply.events(timeout), media_type=reply.media_type)
    async with asyncio.timeout(timeout):
        return JSONResponse(await until_gone(request, reply.whole()))


@router.get("/v1/models", responses=document.errors(401, 431), response_model=document.ModelsBody)
async def models(served: From) -> dict[str, Any]:
    card = {"id": served.serving.model, "object": "model", "created": served.created, "owned_by": "pagedjax"}
    return {"object": "list", "data": [card | {"max_model_len": served.max_model_len}]}


@router.post("/tokenize", responses=document.BODY_ERRORS, response_model=document.TokenizeBody)
async def tokenize(body: TokenizeRequest, served: From) -> dict[str, Any]:
    ids = await served.serving.tokenize(body)
    return {"tokens": ids, "count": len(ids), "max_model_len": served.max_model_len}


@router.post("/detokenize", responses=document.BODY_ERRORS, response_model=document.DetokenizeBody)
async def detokenize(body: DetokenizeRequest, served: From) -> dict[str, Any]:
    return {"prompt": await asyncio.to_thread(served.serving.detokenize, body)}


@router.get("/", include_in_schema=False)
async def playground() -> Response:
    headers = {"Content-Security-Policy": CONTENT_POLICY, "X-Frame-Options": "DENY"}
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


@router.get("/health", response_class=Response, responses=document.plain() | {503: {"description": "failed"}})
async def health(served: From) -> Response:
    return Response(status_code=503 if served.serving.engine.error else 200)


@router.get("/version", responses=document.errors(431), response_model=document.VersionBody)
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/metrics", response_class=PlainTextResponse, responses=document.plain("text/plain"))
async def prometheus(served: From) -> Response:
    return PlainTextResponse(served.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def until_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled if the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first: Any = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return error_response(400, f"{where or 'body'}: {first['msg']}", where or None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        status = status_of(error)
        if status == 500:
            logger.error("a request failed: %r", error)
        return JSONResponse(body_of(error), status, {"Retry-After": "1"} if status == 503 else None)

    for kind in (ValueError, TypeError, QueueFullError, EngineDeadError, asyncio.TimeoutError, Exception):
        app.add_exception_handler(kind, failed)
