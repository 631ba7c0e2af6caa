"""Clients of a server's streamed completions, in a process of their own and without jax.

Reads jobs from standard input, a line of JSON each: {"port", "start", "streams", "requests": [[prompt ids, output
tokens], ...]}. From `start` (`time.monotonic`, which all processes share) on, `streams` requests at a time go to the
server on loopback, each on a new connection. What comes is only kept with its time, and read when all is there; one
line of JSON answers.
"""

import asyncio
import json
import sys
import time
from bisect import bisect_left
from collections import deque
from itertools import accumulate, pairwise
from typing import Any

START = b"HTTP/1.1 200 OK\r\n"


def http_request(prompt: list[int], output: int) -> bytes:
    """Of exactly so many output tokens, greedy and streamed."""
    body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True}
    content = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


class Reader(asyncio.Protocol):
    """Sends one request, and keeps what comes, with its times, until the server closes the connection."""

    def __init__(self, request: bytes):
        self._request = request
        self.parts: list[bytes] = []
        self.times: list[float] = []
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.times.append(time.monotonic())
        self.parts.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.done.set_result(exc)

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """Server-sent events with the times at which their last bytes came. ValueError on anything else."""
        data, ends = b"".join(self.parts), list(accumulate(map(len, self.parts)))
        if not data.startswith(START) or not data.endswith(b"\r\n0\r\n\r\n"):
            raise ValueError(f"the server's response is no whole stream: {data[:300]!r} ... {data[-100:]!r}")
        events, at = [], data.index(b"\r\n\r\n") + 4
        while True:
            line = data.index(b"\r\n", at)
            begin, size = line + 2, int(data[at:line], 16)
            if not size:
                break
            at = begin + size + 2
            came = self.times[bisect_left(ends, at)]
            for event in data[begin : begin + size].decode().removesuffix("\n\n").split("\n\n"):
                events.append((came, event.removeprefix("data: ")))
        if events[-1][1] != "[DONE]":
            raise ValueError(f"the stream's last event is {events[-1][1]!r}, expected [DONE]")
        return [(came, json.loads(event)) for came, event in events[:-1]]


async def one(port: int, request: bytes) -> tuple[float, Reader]:
    """When it was begun, and what came of it."""
    begun = time.monotonic()
    _, reader = await asyncio.get_running_loop().create_connection(lambda: Reader(request), "127.0.0.1", port)
    await reader.done
    return begun, reader


async def run(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of all times; gaps are those between the events of a stream."""
    waiting = deque(http_request(*request) for request in job["requests"])
    finished: list[tuple[float, Reader]] = []

    async def work() -> None:
        while waiting:
            finished.append(await one(job["port"], waiting.popleft()))

    await asyncio.sleep(max(0.0, job["start"] - time.monotonic()))
    cpu = time.process_time()
    await asyncio.gather(*(work() for _ in range(job["streams"])))
    cpu, ended = time.process_time() - cpu, time.monotonic()
    result: dict[str, Any] = {"ttft": [], "gaps": [], "num_tokens": 0, "cpu": cpu, "ended": ended}
    for begun, reader in finished:
        *events, (_, last) = reader.events()
        times = [came for came, event in events if event["choices"]]
        result["ttft"].append(times[0] - begun)
        result["gaps"] += [later - sooner for sooner, later in pairwise(times)]
        result["num_tokens"] += last["usage"]["completion_tokens"]
    return result


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(run(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
