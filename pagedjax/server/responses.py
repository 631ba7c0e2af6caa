"""What clients get: OpenAI's response bodies and stream chunks, from the engine's deltas."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from uuid import uuid4

from pagedjax.request import Logprob, Logprobs, Request

from .async_engine import Delta
from .tools import MakeReader, Reader


class Reply:
    """One response: its identity, and bodies of its kind, whole or in chunks."""

    prefix = object = chunk_kind = ""

    def __init__(self, model: str, request_id: str | None = None):
        self.id = f"{self.prefix}-{request_id or uuid4().hex}"
        self.model, self.created = model, int(time.time())

    def body(self, choices: list[dict[str, Any]], kind: str = "", **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": self.object + kind, "created": self.created, "model": self.model}
        return head | {"choices": choices} | more


class Completion(Reply):
    prefix, object = "cmpl", "text_completion"

    def __init__(self, model: str, request_id: str | None, token_text: Callable[[int], str]):
        super().__init__(model, request_id)
        self._token_text = token_text
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def first(self, index: int) -> dict[str, Any] | None:
        """A choice's first chunk, if it comes before any text."""
        return None

    def choice(self, delta: Delta, text: str, logprobs: Sequence[tuple[int, Logprobs | None]] | None) -> dict[str, Any]:
        """Of a delta whose `index` is the choice's, with this text; `logprobs`: of these tokens, None without."""
        offset = self._offsets.get(delta.index, 0)
        self._offsets[delta.index] = offset + len(text)
        return {
            "index": delta.index,
            "text": text,
            "logprobs": None if logprobs is None else completion_logprobs(logprobs, offset, self._token_text),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    chunk = choice


class Chat(Reply):
    prefix, object, chunk_kind = "chatcmpl", "chat.completion", ".chunk"
    num_top = 0  # alternatives that were asked for

    def __init__(self, model: str, request_id: str | None, make_reader: MakeReader | None = None):
        """`make_reader`: of a choice's tool calls, if there may be some."""
        super().__init__(model, request_id)
        self._make_reader = make_reader
        self._readers: dict[int, Reader] = {}

    def first(self, index: int) -> dict[str, Any] | None:
        return self._chunk(Delta(index), {"role": "assistant", "content": ""}, None)

    def choice(self, delta: Delta, text: str, logprobs: Sequence[tuple[int, Logprobs | None]] | None) -> dict[str, Any]:
        found = None if logprobs is None else chat_logprobs(logprobs, self.num_top)
        made = self._chunk(delta, {"role": "assistant", **self._read(delta, text)}, found)
        message = made.pop("delta")
        for call in message.get("tool_calls", ()):
            del call["index"]  # which only chunks have
        return made | {"message": {"content": None} | message}

    def chunk(self, delta: Delta, text: str, logprobs: Sequence[tuple[int, Logprobs | None]] | None) -> dict[str, Any]:
        found = None if logprobs is None else chat_logprobs(logprobs, self.num_top)
        return self._chunk(delta, self._read(delta, text), found)

    def _read(self, delta: Delta, text: str) -> dict[str, Any]:
        """What a text says: content, or tool calls, which give the choice its reason to end."""
        if self._make_reader is None:
            return {"content": text}
        reader = self._readers.setdefault(delta.index, self._make_reader())
        content, calls = reader.read(text, delta.finish_reason is not None)
        if delta.finish_reason == "stop" and reader.num_calls and not reader.forced:
            delta.finish_reason = "tool_calls"
        return ({"content": content} if content or not calls else {}) | ({"tool_calls": calls} if calls else {})

    def _chunk(self, delta: Delta, content: dict[str, Any], logprobs: Any) -> dict[str, Any]:
        return {
            "index": delta.index,
            "delta": content,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }


def usage(prompts: Iterable[Request], num_outputs: int) -> dict[str, Any]:
    """Token counts; `prompts` has one sequence of each."""
    first = list(prompts)
    num_prompt = sum(len(request.prompt_token_ids) for request in first)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_outputs,
        "total_tokens": num_prompt + num_outputs,
        "prompt_tokens_details": {"cached_tokens": sum(request.num_cached_tokens for request in first)},
    }


def completion_logprobs(
    tokens: Sequence[tuple[int, Logprobs | None]], offset: int, token_text: Callable[[int], str]
) -> dict[str, Any]:
    """OpenAI's four lists. What nothing predicts, a prompt's first token, has null."""
    out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, found in tokens:
        text = token_text(token)
        out["tokens"].append(text)
        out["token_logprobs"].append(None if found is None else found[token].logprob)
        tops = None if found is None else {token_text(i): logprob.logprob for i, logprob in found.items()}
        out["top_logprobs"].append(tops)
        out["text_offset"].append(offset)
        offset += len(text)
    return out


def chat_logprobs(tokens: Sequence[tuple[int, Logprobs | None]], num_top: int) -> dict[str, Any]:
    """Of each token, with the `num_top` likeliest in its place."""
    content = []
    for token, found in tokens:
        assert found is not None
        likeliest = sorted(found.values(), key=lambda logprob: logprob.rank or 0)[:num_top]
        content.append(_chat_logprob(found[token]) | {"top_logprobs": [_chat_logprob(top) for top in likeliest]})
    return {"content": content}


def _chat_logprob(logprob: Logprob) -> dict[str, Any]:
    text = logprob.decoded_token or ""
    return {"token": text, "logprob": max(logprob.logprob, -9999.0), "bytes": list(text.encode())}
