"""What does paging buy?

Question: output tokens per second, requests in flight, and latency against the rate of arrivals, of six systems with
the same bytes for KV:
  dense-static, dense-continuous   an engine of its own (`dense_engine.py`) over rows of `--max-len` tokens, with the
           faster of XLA's and cuDNN's attention; a batch starts and ends together, or a free row is refilled at once;
  max, pow2, oracle, paged   the paged engine, its pages allocated as Orca would or on demand: what differs is memory
           alone (arXiv 2309.06180, section 6.1).
Varied: system; in `latency`, Poisson arrivals of a rate that rises until the system is saturated: mean latency over
output length beyond 3 times that of the lowest rate, or 1 s a token. Held: model code, weights, dtype, sampler
(greedy), KV bytes, requests and arrivals of a trial. The paged pool's null page comes on top, so that `max` loses no
request for it. `tokens_per_s` has the tail, when nobody waits any more; `..._queued` end where it begins.
Expected, of LLaMA-2-7B with 8 GiB (16384 tokens) on an H200: dense rows and `max` hold 8 requests, pow2 11, oracle 14
and paged 40, as in the paper's Fig 13 (7, 10, 14, 30). There a step takes 4 ms with 8 requests and 6 with 40, where an
A100 paid relatively more, so with a queue paged has 3.5 times the tokens/s of `max` and 2 times oracle's; it bears
1.5 to 2 times the rate of oracle and 3 to 4 times of `max` (the paper's Fig 12: 1.7 to 2.7, 2.7 to 8).
Dense-continuous is 10 to 20 % behind `max`, since it reads all rows as far as the longest; static has half of it.

    python -m experiments.dense_kv [--system paged max ...] [--part throughput latency] [--workload sharegpt-like-256]
    python -m experiments.dense_kv --workload alpaca-like-1000 --first 512 --max-num-seqs 384 --rates 8 16 32 64 128

Rows go to `results/dense_kv.jsonl`, one a trial.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax.bench import Lengths, Runnable, Workload, load_workload, run_workload
from pagedjax.compilation_cache import use_compilation_cache
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine
from pagedjax.kv_cache import bytes_per_page
from pagedjax.models.llama import Llama, Params
from pagedjax.models.load import dummy_params, open_checkpoint, read_config
from pagedjax.page_pool import NULL_PAGE
from pagedjax.request import Request

from .common import Parser, conditions, engine_config, record, shape_path
from .dense_attention import Choice, choose
from .dense_engine import DenseEngine, DenseRunner, cuts, prompt_sizes

DENSE = {"dense-static": False, "dense-continuous": True}  # whether a free row is refilled at once
SYSTEMS = [*DENSE, "max", "pow2", "oracle", "paged"]
PAGE_SIZE, CUT = 16, 256
PAPER_RATES = {"oracle": "1.7 to 2.7x", "max": "2.7 to 8x"}  # figure 12: vLLM's rate of requests to Orca's
SATURATED, SATURATED_S = 3, 1.0  # times the latency at the lowest rate; seconds a token
SMALL = {"kv_gib": 1 / 1024, "max_len": 128, "first": 8, "rates": [20.0, 200.0], "seconds": 0.1, "longest": 16}
SMALL |= {"max_num_seqs": 4, "max_num_batched_tokens": 16, "repeat": 1, "rate_repeat": 1}


class Gauge:
    """Looks at an engine after each step: how many run, and what had come out when nobody waited any more."""

    def __init__(self, engine: Runnable):
        self._scheduler, self._seen, self._start = engine.scheduler, set[Request](), time.perf_counter()
        self._running: list[int] = []
        self._queued: tuple[int, float] | None = None  # steps with a queue, and tokens per second until its end

    def after_step(self, num_steps: int) -> None:
        running = self._scheduler.running
        self._running.append(len(running))
        if self._queued is None:
            self._seen.update(running)
            if not self._scheduler.waiting:
                num_tokens = sum(len(request.output_token_ids) for request in self._seen)
                self._queued = num_steps, num_tokens / (time.perf_counter() - self._start)

    def row(self, all_at_once: bool) -> dict[str, Any]:
        """Means over steps; with a queue only where one stands from the start."""
        row = {"mean_in_flight": float(np.mean(self._running))}
        if not all_at_once or self._queued is None:
            return row
        num_steps, tokens_per_s = self._queued
        in_flight = float(np.mean(self._running[:num_steps]))
        return row | {"mean_in_flight_queued": in_flight, "tokens_per_s_queued": tokens_per_s}


class Systems:
    """Makes the systems, which share model and weights."""

    def __init__(self, args: argparse.Namespace):
        self.args, platform = args, jax.default_backend()
        self.path = shape_path(args.shape, args.small)
        settings = EngineConfig(model=self.path, skip_tokenizer_init=True)
        config = read_config(open_checkpoint(self.path)[0])
        dtype = jnp.dtype(settings.resolve_dtype(platform, config.dtype))
        self.model = Llama(config, fused=settings.fuse(platform), dtype=dtype)
        self.params: Params = dummy_params(self.model, 0)
        self.executables = use_compilation_cache(None)
        self.budget = int(args.kv_gib * (1 << 30))
        self.attention = self._attention() if set(DENSE) & set(args.system) else None

    @property
    def num_rows(self) -> int:
        """Of a dense cache."""
        num_rows = self.budget // (self.args.max_len * bytes_per_page(self.model.config, 1, self.model.dtype))
        if not num_rows:
            raise ValueError(f"kv_gib={self.args.kv_gib} holds no row of max_len={self.args.max_len} tokens")
        return num_rows

    @property
    def num_pages(self) -> int:
        return self.budget // bytes_per_page(self.model.config, PAGE_SIZE, self.model.dtype)

    def _attention(self) -> Choice:
        lengths = cuts(self.args.max_len, CUT), prompt_sizes(self.args.max_len)
        return choose(self.model.config, self.model.dtype, self.num_rows, self.args.max_len, *lengths)

    def make(self, system: str) -> tuple[Runnable, dict[str, Any]]:
        """A system with all compiled, and what its rows say of it."""
        start = time.perf_counter()
        engine, about = self._dense(DENSE[system]) if system in DENSE else self._paged(system)
        run_workload(engine, Workload("first steps", [(20, 4)] * 8), seed=0)  # what Python and the driver do once
        return engine, {"system": system, **about, "warm_up_s": time.perf_counter() - start}

    def _dense(self, continuous: bool) -> tuple[Runnable, dict[str, Any]]:
        assert self.attention is not None
        sizes = self.num_rows, self.args.max_len, CUT
        runner = DenseRunner(self.model, self.params, *sizes, self.attention, self.executables)
        runner.warm_up()
        config = {"num_rows": self.num_rows, "max_len": self.args.max_len, "cut": CUT, "fused": self.model.fused}
        config |= {"dtype": str(self.model.dtype), "continuous": continuous, "prompt_sizes": runner.prompt_sizes}
        about = {"capacity": self.num_rows, "capacity_of": "rows", "attention": self.attention.row(), "config": config}
        return DenseEngine(runner, continuous), about

    def _paged(self, allocation: str) -> tuple[Runnable, dict[str, Any]]:
        config = EngineConfig(
            model=self.path,
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype=str(self.model.dtype),
            max_model_len=self.args.max_len,
            page_size=PAGE_SIZE,
            num_pages=NULL_PAGE + 1 + self.num_pages,
            max_num_seqs=self.args.max_num_seqs,
            max_num_batched_tokens=self.args.max_num_batched_tokens,
            enable_prefix_caching=False,
            allocation=allocation,
        )
        engine = Engine(config, self.model, self.params, None, self.executables)
        engine.warm_up(progress=False)
        attention, config = engine.config.attention_impl, engine_config(engine)
        return engine, {"capacity": self.num_pages, "capacity_of": "pages", "attention": attention, "config": config}


def drawn(args: argparse.Namespace, seed: int, count: int) -> Workload:
    """So many requests of the workload in random order, over again if it has fewer, cut to what a row holds."""
    lengths = load_workload(args.workload).lengths
    chosen: Lengths = [lengths[i] for i in np.resize(np.random.default_rng(seed).permutation(len(lengths)), count)]
    most = args.longest or args.max_len
    chosen = [(min(prompt, most, args.max_len - 1), min(output, most)) for prompt, output in chosen]
    return Workload(args.workload, [(prompt, min(output, args.max_len - prompt)) for prompt, output in chosen])


def measured(
    engine: Runnable, args: argparse.Namespace, seed: int, count: int, rate: float | None = None
) -> dict[str, Any]:
    """One trial's row."""
    gauge = Gauge(engine)
    rates = {} if rate is None else {"request_rate": rate}
    result = run_workload(engine, drawn(args, seed, count), seed, after_step=gauge.after_step, **rates)
    row = {"seed": seed, "rate": rate, "requests": count, "tokens_per_s": result.pop("output_tokens_per_s")}
    return row | gauge.row(all_at_once=rate is None) | result


def throughput(engine: Runnable, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in range(args.repeat):
        yield measured(engine, args, seed, args.first)


def latency(engine: Runnable, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    limit = SATURATED_S
    for i, rate in enumerate(args.rates):
        means = []
        for seed in range(args.rate_repeat):
            row = measured(engine, args, seed, max(round(rate * args.seconds), 1), rate)
            means.append(row["normalized_latency_s"]["mean"])
            yield row | {"saturated": means[-1] > limit}
        if i == 0:
            limit = min(limit, SATURATED * float(np.mean(means)))
        if np.mean(means) > limit:
            return


PARTS = {"throughput": throughput, "latency": latency}


def parse() -> argparse.Namespace:
    parser = Parser("dense_kv", __doc__, small="a tiny shape, few short requests")
    parser.add_argument("--shape", default="llama2-7b", help="a named shape, or a config.json")
    parser.add_argument("--system", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--workload", default="sharegpt-like-256")
    parser.add_argument("--kv-gib", type=float, default=8)
    parser.add_argument("--max-len", type=int, default=2048, help="tokens of prompt and output together")
    parser.add_argument("--first", type=int, default=64, help="requests of a trial of throughput")
    parser.add_argument("--repeat", type=int, default=3, help="trials of throughput")
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 4, 7, 11, 16, 24], help="requests a second")
    parser.add_argument("--seconds", type=float, default=8, help="of arrivals, at a rate")
    parser.add_argument("--rate-repeat", type=int, default=3, help="trials of a rate")
    parser.add_argument("--max-num-seqs", type=int, default=128, help="of the paged engine")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="the same")
    parser.set_defaults(longest=None)  # output of a small run
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    return args


def main() -> None:
    args = parse()
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    held = conditions()
    systems = Systems(args)
    held |= {"shape": Path(args.shape).stem, "workload": args.workload, "kv_budget_bytes": systems.budget}
    if systems.attention:
        print(f"dense attention: {systems.attention.row()}", flush=True)
    for system in args.system:
        engine, about = systems.make(system)
        print(f"{system}: {about['capacity']} {about['capacity_of']}, ready in {about['warm_up_s']:.1f} s", flush=True)
        for part in args.part:
            for result in PARTS[part](engine, args):
                record(args.results, {"part": part, **about, **result, **held})
                show(part, system, result)
        del engine
        gc.collect()  # its cache goes before the next one comes


def show(part: str, system: str, row: dict[str, Any]) -> None:
    rate = "all at once" if row["rate"] is None else f"{row['rate']:g} a second"
    ms = {name: seconds * 1e3 for name, seconds in row["normalized_latency_s"].items()}
    queued = ""
    if "tokens_per_s_queued" in row:
        queued = f" (while some wait {row['tokens_per_s_queued']:.1f}, {row['mean_in_flight_queued']:.1f} in flight)"
    print(
        f"{part} {system} seed {row['seed']}, {rate}: {row['seconds']:.1f} s, {row['tokens_per_s']:.1f} tokens/s, "
        f"{row['mean_in_flight']:.1f} in flight{queued}, ms/token {ms['mean']:.1f}, p90 {ms['p90']:.1f}"
        f"{', saturated' if row.get('saturated') else ''}",
        flush=True,
    )


if __name__ == "__main__":
    main()
