"""What comes of prompts in the engine, as responses: whole, or event by event."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import orjson

from pagedjax.prompts import ReadPrompt
from pagedjax.request import Logprobs
from pagedjax.sampling_params import SamplingParams

from .async_engine import AsyncEngine, Delta, Stream
from .errors import body_of
from .responses import Chat, Completion, usage

Found = Sequence[tuple[int, Logprobs | None]]
Decode = Callable[[list[int]], str]


async def merged(sources: Sequence[AsyncGenerator[Any]]) -> AsyncGenerator[tuple[int, Any]]:
    """What several iterators give, with their numbers, as it comes; all end when one fails or nobody wants more."""
    if len(sources) == 1:  # without tasks and a queue, which cost more than all else that an event takes
        async with aclosing(sources[0]) as source:
            async for item in source:
                yield 0, item
        return
    arrived: asyncio.Queue[tuple[int, Any, BaseException | None]] = asyncio.Queue(1)
    end = object()

    async def pump(number: int, source: AsyncIterator[Any]) -> None:
        error = None
        try:
            async for item in source:
                await arrived.put((number, item, None))
        except Exception as failure:
            error = failure
        await arrived.put((number, end, error))

    tasks = [asyncio.create_task(pump(i, source)) for i, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            number, item, error = await arrived.get()
            if error:
                raise error
            if item is end:
                left -= 1
            else:
                yield number, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % orjson.dumps(value)


class Running:
    """Prompts in the engine."""

    def __init__(
        self, engine: AsyncEngine, params: SamplingParams, prompts: list[ReadPrompt], whole: bool, **more: Any
    ):
        self.params, self.prompts = params, prompts
        salt = more.pop("cache_salt", None)
        streams = []
        for prompt in prompts:
            item = {"prompt": prompt.text, "prompt_token_ids": prompt.token_ids} | (
                {"cache_salt": salt} if salt else {}
            )
            streams.append(engine.generate(uuid4().hex, item, params, whole=whole, **more))
        self.source = merged(streams)
        self.streams: dict[int, Stream] = {}
        self.num_outputs = 0
        self._first: tuple[int, Any] | None = None

    async def begin(self) -> None:
        """Waits for the first tokens, so that what the engine refuses is an error and no stream."""
        self._first = await anext(self.source)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta]]:
        """With the numbers of prompts."""
        try:
            if self._first is not None:
                for item in self._take(*self._first):
                    yield item
            async for number, item in self.source:
                for pair in self._take(number, item):
                    yield pair
        finally:
            await self.source.aclose()

    def _take(self, number: int, item: tuple[Stream, list[Delta]]) -> list[tuple[int, Delta]]:
        stream, deltas = item
        self.streams[number] = stream
        self.num_outputs += sum(len(delta.token_ids) for delta in deltas)
        return [(number, delta) for delta in deltas]


class Answer(Running):
    """A completion, or a chat's."""

    media_type = "text/event-stream"

    def __init__(
        self,
        engine: AsyncEngine,
        body: Any,
        params: SamplingParams,
        prompts: list[ReadPrompt],
        reply: Completion | Chat,
        decode: Decode,
    ):
        more = {"cache_salt": body.cache_salt, "priority": body.priority}
        super().__init__(engine, params, prompts, not body.stream, **more)
        self.body, self.reply, self.decode = body, reply, decode
        self.echo = getattr(body, "echo", False)
        self.hidden = self.echo and body.max_tokens == 0  # outputs, which are computed for the prompt's sake

    async def whole(self) -> dict[str, Any]:
        choices: dict[int, dict[str, Any]] = {}
        async for number, delta in self.deltas():
            index = number * self.params.n + delta.index
            choices[index] = self._made(self.reply.choice, number, delta, index, first=True)
        return self.reply.body([choices[i] for i in sorted(choices)], usage=self._usage())

    async def events(self, timeout: float | None) -> AsyncIterator[bytes]:
        """Server-sent events, to the last. An error in the middle is one of them."""
        options = self.body.stream_options
        begun: set[int] = set()
        try:
            async with asyncio.timeout(timeout), aclosing(self.deltas()) as deltas:
                async for number, delta in deltas:
                    index = number * self.params.n + delta.index
                    first = index not in begun
                    opening = self.reply.first(index) if first else None
                    if opening:
                        yield sse(self.reply.body([opening], self.reply.chunk_kind))
                    begun.add(index)
                    choice = self._made(self.reply.chunk, number, delta, index, first)
                    more = {"usage": self._usage()} if options and options.continuous_usage_stats else {}
                    yield sse(self.reply.body([choice], self.reply.chunk_kind, **more))
            if options and options.include_usage:
                yield sse(self.reply.body([], self.reply.chunk_kind, usage=self._usage()))
        except Exception as error:
            yield sse(body_of(error))
        yield b"data: [DONE]\n\n"

    def _made(self, make: Callable[..., Any], number: int, delta: Delta, index: int, first: bool) -> dict[str, Any]:
        """A choice or chunk, which begins with the prompt if that is echoed."""
        delta.index = index
        text, found = delta.text, self._found(delta)
        if self.hidden:
            text, found = "", [] if found is not None else None
            delta.finish_reason = "length"
        if self.echo and first:
            prompt = self.prompts[number]
            text = (self.decode(prompt.token_ids) if prompt.text is None else prompt.text) + text
            if found is not None:
                known = self.streams[number].first.prompt_logprobs
                found = [*zip(prompt.token_ids, known, strict=True), *found]
        return make(delta, text, found)

    def _found(self, delta: Delta) -> Found | None:
        if self.params.logprobs is None:
            return None
        return list(zip(delta.token_ids, delta.logprobs, strict=True))

    def _usage(self) -> dict[str, Any]:
        num_outputs = 0 if self.hidden else self.num_outputs
        return usage([stream.first for stream in self.streams.values()], num_outputs)


class Generated(Running):
    """The demo API's: prompt and output of each sample, whole or cumulative."""

    media_type = "application/x-ndjson"

    def __init__(self, engine: AsyncEngine, params: SamplingParams, prompt: ReadPrompt, stream: bool):
        super().__init__(engine, params, [prompt], not stream)
        self._texts = [prompt.text or ""] * params.n

    async def whole(self) -> dict[str, Any]:
        async for _, delta in self.deltas():
            self._texts[delta.index] += delta.text
        return {"text": self._texts}

    async def events(self, timeout: float | None) -> AsyncIterator[str]:
        """One JSON object a line."""
        async with asyncio.timeout(timeout), aclosing(self.deltas()) as deltas:
            async for _, delta in deltas:
                self._texts[delta.index] += delta.text
                yield json.dumps({"text": self._texts}, ensure_ascii=False) + "\n"
