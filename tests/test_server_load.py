"""`pagedjax serve` as a process of its own: many clients, some of which leave."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

pytestmark = pytest.mark.alone
CLIENTS, SAMPLES = 200, 100
BODY: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 12, "ignore_eos": True, "stream": True}
COMMAND = [sys.executable, "-m", "pagedjax.cli", "serve", "--port", "0", "--max-model-len", "256", "--num-pages", "400"]


class Process:
    """A server, its address, and what it has logged."""

    def __init__(self, folder: Path, *options: str):
        self.log = folder / "log.txt"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as log:
            command = [*COMMAND, "--max-num-seqs", "32", *options]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"pagedjax: ready on (http://\S+)\n", line)
        assert found, line + self.log.read_text()
        self.url = found[1]

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"pagedjax:{name} ")))

    def resident_mib(self) -> float:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) / 256

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 30
        names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
        while any(self.metric(name) for name in names):
            assert time.monotonic() < deadline, "a request stays"
            time.sleep(0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Process]:
    server = Process(tmp_path, "--log-json")
    yield server
    server.process.kill()
    server.process.communicate()


async def stream(client: httpx.AsyncClient, url: str, most: int | None = None, **more: Any) -> list[str]:
    """Events of one request; the client leaves after the first `most` of them."""
    events: list[str] = []
    async with client.stream("POST", f"{url}/v1/completions", json=BODY | more) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            events += [line] if line else []
            if len(events) == most:
                break
    return events


async def health(client: httpx.AsyncClient, url: str, times: list[float], done: asyncio.Event) -> None:
    while not done.is_set() or len(times) < SAMPLES:
        start = time.perf_counter()
        assert (await client.get(f"{url}/health")).status_code == 200
        times.append(time.perf_counter() - start)
        await asyncio.sleep(0.01)


async def crowd(url: str) -> tuple[list[list[str]], list[float], list[float]]:
    """All clients at once, a third of which leave; how long /health takes before, and meanwhile."""
    idle, busy, done = [], [], asyncio.Event()
    limits = httpx.Limits(max_connections=CLIENTS + 10)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client, httpx.AsyncClient(timeout=60) as other:
        done.set()
        await health(other, url, idle, done)
        done.clear()
        watching = asyncio.create_task(health(other, url, busy, done))
        clients = [stream(client, url, 1 + i % 5 if i % 3 == 0 else None, seed=i) for i in range(CLIENTS)]
        events = await asyncio.gather(*clients)
        done.set()
        await watching
    return events, idle, busy


def test_many_clients_a_third_of_which_leave_and_nothing_stays(server: Process):
    resident = []
    for _ in range(3):
        events, idle, busy = asyncio.run(crowd(server.url))
        stayed = [e for i, e in enumerate(events) if i % 3]
        assert all(e[-1] == "data: [DONE]" for e in stayed)
        last = [json.loads(e[-2].removeprefix("data: "))["choices"][0] for e in stayed]
        assert all(choice["finish_reason"] == "length" for choice in last)
        server.wait_until_idle()
        resident.append(server.resident_mib())
        p99 = [float(np.percentile(times, 99)) * 1e3 for times in (idle, busy)]
        print(f"/health p99 {p99[0]:.1f} ms idle, {p99[1]:.1f} ms busy; {resident[-1]:.0f} MiB")
        assert p99[1] <= 10 * max(p99[0], 5)  # two cores, of which the model takes both
    assert resident[2] <= resident[1] * 1.02
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert len(lines) == 3 * CLIENTS and BODY["prompt"] not in server.log.read_text()
    assert {"prompt_tokens", "output_tokens", "ttft_s", "total_s", "finish_reason"} < set(lines[-1])


def test_sigterm_under_load_loses_no_response(server: Process):
    async def run() -> list[list[str]]:
        async with httpx.AsyncClient(timeout=600) as client:
            tasks = [asyncio.create_task(stream(client, server.url, seed=i, max_tokens=40)) for i in range(20)]
            await asyncio.sleep(1)  # all have been sent, and none can have ended
            server.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

    events = asyncio.run(run())
    assert all(e[-1] == "data: [DONE]" and len(e) > 2 for e in events)
    assert server.process.wait(60) == -signal.SIGTERM  # which uvicorn raises again when all is done
