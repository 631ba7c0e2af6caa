"""What `/openapi.json` says of responses: the fields that bodies have at least. Tests hold the server to it."""

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from .tools import ToolCall

DESCRIPTIONS = {
    400: "a field or body that is not accepted",
    401: "no valid API key",
    404: "a model that is not served here",
    408: "the body did not come in time",
    413: "too large a body",
    431: "too large headers",
    500: "the engine has failed, or something unforeseen has",
    503: "too many requests, or the server is stopping; retry",
    504: "the request took too long",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(BaseModel):
    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    finish_reason: str
    stop_reason: int | str | None


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None


class Likely(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob] | None


class Message(BaseModel):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Choice):
    message: Message
    logprobs: ChatLogprobs | None


class Response(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage


class CompletionBody(Response):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatBody(Response):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class GenerateBody(BaseModel):
    text: list[str]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelsBody(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class TokenizeBody(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeBody(BaseModel):
    prompt: str


class VersionBody(BaseModel):
    version: str


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": DESCRIPTIONS[status]} for status in statuses}


# Of one event, and of the lines together.
STREAMED = {
    "text/event-stream": {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]},
    "application/x-ndjson": {"type": "string"},
}
BODY_ERRORS = errors(400, 401, 404, 408, 413, 431, 500, 503, 504)


def body(model: type[BaseModel], streamed: str | None = None) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that takes a body; `streamed`: the media type of those in parts."""
    content = {} if streamed is None else {"content": {streamed: {"schema": STREAMED[streamed]}}}
    return {200: {"model": model, "description": "Successful Response", **content}, **BODY_ERRORS}


def plain(media_type: str | None = None) -> dict[int | str, dict[str, Any]]:
    """Of a route that answers with text, or with nothing."""
    content = {} if media_type is None else {"content": {media_type: {"schema": {"type": "string"}}}}
    return {200: {"description": "Successful Response", **content}, **errors(431)}


def describe(app: FastAPI, open_paths: tuple[str, ...]) -> None:
    """Has the document tell of keys, and not of FastAPI's own 422, which is a 400 here."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            schemas = document["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if path not in open_paths:
                        operation["security"] = [{"key": []}]
        return app.openapi_schema or {}

    app.openapi = openapi  # pyright: ignore[reportAttributeAccessIssue]
