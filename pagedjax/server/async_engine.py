"""The engine in a thread of its own, for a server's event loop.

The thread alone touches the engine and the device. Requests and aborts reach it by a queue, and what its steps bring
goes back to the loop in one call a step. A stream that is read slowly gets more text at a time, not a longer queue. If
the engine fails, so does every request that waits, and every later one.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pagedjax.llm import LLM
from pagedjax.request import Logprobs, Request, Status
from pagedjax.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine has failed; nothing more will come of it."""


class QueueFullError(RuntimeError):
    """As many requests are under way as may be, or the server is about to stop."""


@dataclass(slots=True)
class Delta:
    """What one sequence of a request has got since the last one."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def extend(self, later: "Delta") -> None:
        """By what the same sequence has got since."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


def joined(deltas: list[Delta], later: list[Delta]) -> list[Delta]:
    """One of each sequence, in the order in which they began to wait."""
    by_index = {delta.index: delta for delta in deltas}
    for delta in later:
        if delta.index in by_index:
            by_index[delta.index].extend(delta)
        else:
            by_index[delta.index] = delta
    return list(by_index.values())


@dataclass(eq=False)
class Stream:
    """One request on its way through the engine. `whole`: nothing comes before a sequence has ended."""

    request_id: str
    prompt: Any
    params: SamplingParams
    priority: int
    whole: bool
    requests: list[Request] = field(default_factory=list)
    waiter: asyncio.Future[None] | None = None  # of its task, while there is nothing for it
    deltas: list[Delta] = field(default_factory=list)
    error: Exception | None = None
    ended: bool = False
    sent: list[tuple[int, int]] = field(default_factory=list)  # tokens and characters of each sequence

    @property
    def first(self) -> Request:
        return self.requests[0]

    def new_deltas(self) -> list[Delta]:
        """In the engine's thread: what its sequences have got since the last call."""
        deltas = []
        for i, request in enumerate(self.requests):
            finished = request.status is Status.FINISHED
            num_tokens, num_chars = self.sent[i]
            if num_tokens < 0 or (self.whole and not finished):
                continue
            text = request.detokenizer.stable_text(finished) if request.detokenizer else ""
            tokens = request.output_token_ids[num_tokens:]
            if not (tokens or finished):
                continue
            logprobs = request.logprobs[num_tokens : num_tokens + len(tokens)]
            reasons = (request.finish_reason, request.stop_reason) if finished else (None, None)
            deltas.append(Delta(i, text[num_chars:], tokens, logprobs, *reasons))
            self.sent[i] = (-1, 0) if finished else (num_tokens + len(tokens), len(text))
        return deltas


class Arrival(NamedTuple):
    """What the engine's thread hands to the event loop."""

    stream: Stream
    deltas: list[Delta]
    ended: bool
    error: Exception | None = None


class Watcher:
    """Is told what happens; the last two in the event loop, `step` in the engine's thread."""

    def step(self, num_tokens: int) -> None: ...

    def arrived(self, stream: Stream, deltas: list[Delta]) -> None: ...

    def ended(self, stream: Stream) -> None: ...


class AsyncEngine:
    """Runs an `LLM`'s engine for many callers. At most `max_requests` are under way at a time."""

    def __init__(self, llm: LLM, max_requests: int = 1024, watchers: Sequence[Watcher] = ()):
        self.llm, self.max_requests, self._watchers = llm, max_requests, watchers
        self.error: BaseException | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}  # the event loop's
        self._running: dict[str, Stream] = {}  # the thread's
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    def start(self) -> None:
        """In the event loop that will make requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Takes no more requests, and returns when those under way have ended."""
        self._stopping = True
        while self._streams and not self.error:
            await asyncio.sleep(0.02)
        self._commands.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    async def generate(
        self, request_id: str, prompt: Any, params: SamplingParams, *, whole: bool = False, priority: int = 0
    ) -> AsyncGenerator[tuple[Stream, list[Delta]]]:
        """What comes of a prompt, as `LLM.generate` takes it, until all its sequences have ended; closing the iterator
        aborts it. Raises what the engine refuses it with, QueueFullError or EngineDeadError."""
        self.check()
        loop = asyncio.get_running_loop()
        stream = Stream(request_id, prompt, params, priority, whole)
        self._streams[request_id] = stream
        self._commands.put(lambda: self._add(stream))
        try:
            while True:
                if not (stream.deltas or stream.ended):
                    stream.waiter = loop.create_future()
                    await stream.waiter
                deltas, stream.deltas = stream.deltas, []
                if stream.error:
                    raise stream.error
                if deltas:
                    for watcher in self._watchers:
                        watcher.arrived(stream, deltas)
                    yield stream, deltas
                if stream.ended and not stream.deltas:  # of which the last may have come while the caller was busy
                    return
        finally:
            del self._streams[request_id]
            if not stream.ended:
                self._commands.put(lambda: self._abort(stream))
            for watcher in self._watchers:
                watcher.ended(stream)

    def check(self) -> None:
        """Raises what a new request would meet: EngineDeadError or QueueFullError."""
        if self.error:
            raise EngineDeadError("the engine has failed") from self.error
        if self._stopping or len(self._streams) >= self.max_requests:
            raise QueueFullError("the server is stopping" if self._stopping else "too many requests are under way")

    def _run(self) -> None:
        engine = self.llm.engine
        try:
            while not (self._stopping and not self._running and self._commands.empty()):
                self._take_commands(wait=not engine.has_unfinished)
                if engine.has_unfinished:
                    before = engine.scheduler.stats.num_scheduled_tokens
                    self._hand_out(engine.step())
                    num_tokens = engine.scheduler.stats.num_scheduled_tokens - before
                    for watcher in self._watchers if num_tokens else ():
                        watcher.step(num_tokens)
        except BaseException as error:
            logger.exception("the engine has failed")
            self.error = error
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._fail)

    def _take_commands(self, wait: bool) -> None:
        if wait:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _add(self, stream: Stream) -> None:
        try:
            _, stream.requests = self.llm.add(stream.request_id, stream.prompt, stream.params, stream.priority)
        except (ValueError, TypeError) as error:
            self._post([Arrival(stream, [], True, error)])
            return
        stream.sent = [(0, 0)] * len(stream.requests)
        self._running[stream.request_id] = stream

    def _abort(self, stream: Stream) -> None:
        if self._running.pop(stream.request_id, None):
            self.llm.engine.abort(stream.requests)

    def _hand_out(self, progressed: list[Request]) -> None:
        """What a step has brought, in one call of the event loop."""
        batch = []
        for request_id in dict.fromkeys(request.request_id for request in progressed):
            stream = self._running.get(request_id)
            if stream is None:
                continue
            deltas, ended = stream.new_deltas(), all(r.status is Status.FINISHED for r in stream.requests)
            if ended:
                del self._running[request_id]
            if deltas:
                batch.append(Arrival(stream, deltas, ended))
        if batch:
            self._post(batch)

    def _post(self, batch: list[Arrival]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_deliver, batch)

    def _fail(self) -> None:
        """In the event loop: ends all requests, those too that the thread has not taken."""
        _deliver([Arrival(s, [], True, EngineDeadError("the engine has failed")) for s in self._streams.values()])


def _deliver(batch: list[Arrival]) -> None:
    for arrival in batch:
        stream = arrival.stream
        if stream.deltas:
            stream.deltas = joined(stream.deltas, arrival.deltas)
        else:
            stream.deltas = arrival.deltas
        stream.error, stream.ended = arrival.error, arrival.ended
        if stream.waiter and not stream.waiter.done():  # done: its task is about to run, or has been cancelled
            stream.waiter.set_result(None)
