"""`pagedjax bench`: a workload of request lengths through the engine, measured as its users would see it.

Prompts are random token ids, decoding is greedy, outputs have exactly the lengths asked for, and nothing is
detokenized. TTFT, TPOT and ITL are `vllm bench serve`'s: time to first token from arrival, mean time per output token
after the first, and every time between two tokens of a request.
"""

import json
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from .engine import Engine
from .request import Request, Status
from .sampling_params import SamplingParams
from .schedule import SchedulerStats

Lengths = list[tuple[int, int]]  # (prompt tokens, output tokens) of each request


@dataclass(frozen=True)
class Workload:
    """Named request lengths."""

    name: str
    lengths: Lengths

    @property
    def max_len(self) -> int:
        return max(prompt + output for prompt, output in self.lengths)


def package_data(folder: str, name: str) -> Traversable:
    """A JSON file that comes with the package; ValueError listing those there are."""
    root = files("pagedjax") / folder
    path = root / f"{name}.json"
    if not path.is_file():
        names = sorted(entry.name.removesuffix(".json") for entry in root.iterdir() if entry.name.endswith(".json"))
        raise ValueError(
            f"{folder.removesuffix('s')}={name!r}; accepted: {', '.join(names)}, or a path to a .json file"
        )
    return path


def load_workload(name: str, num_requests: int | None = None) -> Workload:
    """A workload by its name or path, cut to its first `num_requests`. ValueError on a file of another form."""
    path = Path(name) if name.endswith(".json") else package_data("workloads", name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        lengths = [(int(prompt), int(output)) for prompt, output in values["lengths"]][:num_requests]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"workload={name!r} is not a file of {{name, lengths: [[prompt, output], ...]}}") from error
    if not lengths or min(min(pair) for pair in lengths) < 1:
        raise ValueError(f"workload={name!r} has no requests, or one without prompt or output tokens")
    return Workload(values.get("name", path.name), lengths)


class Runnable(Protocol):
    """What `run_workload` asks of an engine; it need not be ours."""

    runner: Any  # for the size of its model's vocabulary
    scheduler: Any  # for its `stats`

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> list[Request]: ...

    @property
    def has_unfinished(self) -> bool: ...

    def step(self) -> list[Request]: ...

    @property
    def num_compilations(self) -> int: ...

    def check_integrity(self) -> None: ...


def run_workload(
    engine: Runnable,
    workload: Workload,
    seed: int,
    request_rate: float = math.inf,
    after_step: Callable[[int], None] = lambda num_steps: None,
) -> dict[str, Any]:
    """One run, from the first request's arrival to the last token. The engine must be idle.

    Requests arrive all at once, or as a Poisson process of `request_rate` a second. A request's times count from its
    arrival, though the engine looks for arrivals between steps only. `after_step` gets the number of steps so far.
    """
    rng = np.random.default_rng(seed)
    vocab_size = engine.runner.model.config.vocab_size
    engine.scheduler.stats = SchedulerStats()
    compiled = engine.num_compilations
    requests: list[Request] = []
    prompts = [rng.integers(0, vocab_size, prompt).tolist() for prompt, _ in workload.lengths]
    gaps = rng.exponential(1 / request_rate, len(prompts)) if math.isfinite(request_rate) else np.zeros(len(prompts))
    waiting = deque(zip(np.cumsum(gaps) - gaps[0], prompts, workload.lengths, strict=True))
    steps: list[tuple[float, list[Request]]] = []  # when each ended, and who got a token
    start = time.perf_counter()
    while waiting or engine.has_unfinished:
        while waiting and start + waiting[0][0] <= time.perf_counter():
            offset, prompt, (_, output) = waiting.popleft()
            params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
            added = engine.add_request(str(len(requests)), prompt, params)
            added[0].metrics.arrival = start + offset
            requests += added
        if engine.has_unfinished:
            progressed = engine.step()
            steps.append((time.perf_counter(), progressed))
            after_step(len(steps))
        else:
            time.sleep(max(start + waiting[0][0] - time.perf_counter(), 0))
    seconds = time.perf_counter() - start
    engine.check_integrity()
    assert all(r.status is Status.FINISHED for r in requests)
    expected = [output for _, output in workload.lengths]
    assert [len(r.output_token_ids) for r in requests] == expected, "outputs have the wrong lengths"
    return summary(requests, seconds, engine.scheduler.stats) | {
        "itl_ms": _percentiles(inter_token_ms(steps)),
        "compilations_in_run": engine.num_compilations - compiled,
    }


def inter_token_ms(steps: list[tuple[float, list[Request]]]) -> list[float]:
    """Times between consecutive tokens of each request."""
    latest: dict[Request, float] = {}
    gaps = []
    for now, progressed in steps:
        for request in progressed:
            if request in latest:
                gaps.append((now - latest[request]) * 1e3)
            latest[request] = now
    return gaps


def summary(requests: list[Request], seconds: float, stats: SchedulerStats) -> dict[str, Any]:
    """The figures of one run: rates per second, latencies in milliseconds, page waste as a share of allocated slots.

    Normalized latency is the PagedAttention paper's (arXiv 2309.06180): seconds from arrival to the last token, over
    the number of output tokens.
    """
    ttft, tpot, normalized = [], [], []
    for r in requests:
        m = r.metrics
        assert m.first_token is not None and m.finished is not None
        ttft.append((m.first_token - m.arrival) * 1e3)
        normalized.append((m.finished - m.arrival) / len(r.output_token_ids))
        if len(r.output_token_ids) > 1:
            tpot.append((m.finished - m.first_token) * 1e3 / (len(r.output_token_ids) - 1))
    prompt = sum(len(r.prompt_token_ids) for r in requests)
    output = sum(len(r.output_token_ids) for r in requests)
    return {
        "seconds": seconds,
        "output_tokens_per_s": output / seconds,
        "total_tokens_per_s": (prompt + output) / seconds,
        "ttft_ms": _percentiles(ttft),
        "tpot_ms": _percentiles(tpot),
        "normalized_latency_s": {"mean": float(np.mean(normalized)), **_percentiles(normalized)},
        "num_steps": stats.num_steps,
        "page_waste": 1 - stats.used_slots / max(stats.allocated_slots, 1),
        "preemptions": stats.num_preemptions,
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {name: float(np.percentile(values, q)) for name, q in (("p50", 50), ("p90", 90), ("p99", 99))}


def environment() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else platform.processor() or "cpu",
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def bench(
    engine: Engine,
    workloads: Sequence[Workload],
    repeat: int,
    seed: int,
    request_rate: float = math.inf,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Warms up every bucket; then each workload, once unmeasured and `repeat` times: the best run and all of them."""
    start = time.perf_counter()
    engine.warm_up(progress)
    warm_up = time.perf_counter() - start
    config = engine.config
    for workload in workloads:
        run_workload(engine, workload, seed)
        runs = [run_workload(engine, workload, seed + 1 + i, request_rate) for i in range(repeat)]
        yield {
            "workload": workload.name,
            "num_requests": len(workload.lengths),
            "request_rate": request_rate if math.isfinite(request_rate) else None,
            **environment(),
            "model": config.model,
            "dtype": config.dtype,
            "attention_impl": config.attention_impl,
            "page_size": config.page_size,
            "num_pages": config.num_pages,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_mixed_tokens": config.max_mixed_tokens,
            "lookahead": config.lookahead,
            "decode_steps": config.decode_steps,
            "seed": seed,
            "warm_up_s": warm_up,
            "compilations": engine.num_compilations,
            "best": max(runs, key=lambda run: run["output_tokens_per_s"]),
            "runs": runs,
        }


def table(result: dict[str, Any]) -> str:
    """The best run for people to read."""
    best, rate = result["best"], result["request_rate"]
    arrivals = "all at once" if rate is None else f"Poisson, {rate:g} a second"
    rows = [
        ("model", result["model"]),
        ("workload", f"{result['workload']} ({result['num_requests']} requests, {arrivals})"),
        ("device", f"{result['device']}, {result['dtype']}, attention {result['attention_impl']}"),
        ("output tokens/s", f"{best['output_tokens_per_s']:.1f} (best of {len(result['runs'])})"),
        ("total tokens/s", f"{best['total_tokens_per_s']:.1f}"),
        ("seconds", f"{best['seconds']:.2f}, {best['num_steps']} steps"),
    ]
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        values = ", ".join(f"{p} {v:.1f}" for p, v in best[name].items())
        rows.append((name.replace("_ms", "").upper() + " ms", values or "-"))
    rows += [
        (
            "page waste",
            f"{best['page_waste']:.1%} (page size {result['page_size']}, {result['num_pages']} pages)",
        ),
        ("preemptions", str(best["preemptions"])),
        ("compilations", f"{result['compilations']}, {best['compilations_in_run']} of them in the run"),
        ("warm-up", f"{result['warm_up_s']:.1f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
