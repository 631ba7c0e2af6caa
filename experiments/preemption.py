"""What does a pool that is too small cost: recomputed, swapped, or as the rule says?

Questions: tokens per second of a crowd whose pages do not fit, beside the same crowd in a pool that holds it; and how
much of the time of copies to and from host memory the device computes meanwhile. Varied: pool, `preemption_mode`. Held:
shape with random weights, `--requests` greedy requests of 50 to 400 prompt tokens and half to one and a half times
`--output` more, all at once, without prefix caching; the best of `--repeat` runs after one that warms up, and one more
whose middle is profiled. Expected: swapping hides its copies behind steps, at least nine tenths of their time, and
loses less than recomputation wherever `swap_is_faster` says so; by the rule as good as the better of both.

    python -m experiments.preemption [--shape llama3.2-1b] [--mode roomy recompute swap rule] [--small]

Rows go to `results/preemption.jsonl`, one a mode. XLA records no CUDA graphs while it is profiled, so that steps are
longer there and hide more.
"""

import argparse
import tempfile
import time
from bisect import bisect
from typing import Any

import numpy as np

from pagedjax import LLM, SamplingParams
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine

from .common import Parser, conditions, record, shape_path, small_shape
from .timeline import Event, Window, device_events

MODES = "roomy", "recompute", "swap", "rule"
PROMPTS = 50, 400
LARGE = 100_000  # ns; a shorter copy is of tokens or a batch


def make_engine(args: argparse.Namespace, mode: str) -> Engine:
    """Pages for all requests at their ends, or for `--room` of them."""
    longest, share = PROMPTS[1] + args.output * 3 // 2, 1.0 if mode == "roomy" else args.room
    num_pages = int(args.rows * -(-longest // EngineConfig.page_size) * share) + 1
    settings: dict[str, Any] = {"num_pages": num_pages, "max_num_seqs": args.rows}
    if mode in ("swap", "rule"):
        settings |= {"swap_space": args.swap_space, "preemption_mode": "swap" if mode == "swap" else None}
    llm = LLM(
        model=shape_path(args.shape),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_batched_tokens=args.max_tokens,
        enable_prefix_caching=False,
        **settings,
    )
    llm.engine.warm_up(progress=False)
    return llm.engine


def run(engine: Engine, args: argparse.Namespace, window: Window | None = None) -> tuple[float, list[list[int]]]:
    """Seconds, and each request's tokens."""
    rng = np.random.default_rng(0)
    vocab_size, requests = engine.runner.model.config.vocab_size, []
    for i in range(args.requests):
        prompt = rng.integers(0, vocab_size, rng.integers(*PROMPTS)).tolist()
        length = int(rng.integers(args.output // 2, args.output * 3 // 2, endpoint=True))
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        requests += engine.add_request(str(i), prompt, params)
    start, num_steps = time.perf_counter(), 0
    while engine.has_unfinished:
        engine.step()
        num_steps += 1
        if window:
            window.after_step(num_steps)
    return time.perf_counter() - start, [request.output_token_ids for request in requests]


def overlap(events: list[Event]) -> tuple[float, float]:
    """Milliseconds in which large copies to or from the host run, and of those the ones in which a kernel does too."""
    kernels = merged(event for event in events if "memcpy" not in event.name.lower())
    copies = merged(e for e in events if "memcpy" in e.name.lower() and e.end - e.start > LARGE and "D2D" not in e.name)
    both = 0.0
    for start, end in copies:
        for begin, until in kernels[bisect(kernels, (start, start)) - 1 if kernels[0][0] < start else 0 :]:
            if begin >= end:
                break
            both += max(0.0, min(end, until) - max(start, begin))
    return sum(end - start for start, end in copies) / 1e6, both / 1e6


def merged(events: Any) -> list[tuple[float, float]]:
    """Spans of time in which at least one of these runs."""
    spans: list[tuple[float, float]] = []
    for event in sorted(events, key=lambda event: event.start):
        if spans and event.start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], event.end)
        else:
            spans.append((event.start, event.end))
    return spans


def measure(engine: Engine, args: argparse.Namespace) -> tuple[dict[str, Any], list[list[int]]]:
    times = [run(engine, args) for _ in range(args.repeat + 1)][1:]
    before = dict(vars(engine.scheduler.stats))
    with tempfile.TemporaryDirectory() as folder:
        window = Window(engine, args.after, args.steps, folder)
        run(engine, args, window)
        copy_ms, hidden_ms = overlap(device_events(window.profile()))
    counted = {name: value - before[name] for name, value in vars(engine.scheduler.stats).items()}
    engine.check_integrity()
    best = min(seconds for seconds, _ in times)
    row = {"tokens_per_s": sum(map(len, times[0][1])) / best, "copy_ms": copy_ms, "hidden_ms": hidden_ms}
    row |= {name: counted[name] for name in ("num_steps", "num_preemptions", "num_swap_outs", "num_swap_ins")}
    return row | {"swapped_mib": counted["swapped_out_bytes"] / 2**20}, times[0][1]


def main() -> None:
    parser = Parser("preemption", __doc__, small="a few short requests")
    parser.add_argument("--shape", default="llama3.2-1b", help="a named shape, or a config.json")
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--output", type=int, default=300)
    parser.add_argument("--rows", type=int, default=64, help="that run at a time")
    parser.add_argument("--room", type=float, default=0.45, help="the pool, as a share of what the rows may need")
    parser.add_argument("--max-tokens", type=int, default=2048, help="in a step")
    parser.add_argument("--swap-space", type=float, default=16, help="GiB")
    parser.add_argument("--after", type=int, default=30)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if args.small:
        args.requests, args.output, args.rows, args.max_tokens, args.swap_space, args.room = 8, 100, 4, 128, 0.5, 0.3
        args.after, args.steps, args.repeat = 5, 20, 1
        args.shape = small_shape(args.shape)
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    held = conditions()
    held |= {"shape": args.shape, "requests": args.requests, "output": args.output, "rows": args.rows}
    first: list[list[int]] = []
    print(f"{held['device']}, {args.shape}, {args.requests} requests")
    for mode in args.mode:
        engine = make_engine(args, mode)
        row, tokens = measure(engine, args)
        del engine  # its pool goes before the next one comes
        first = first or tokens
        agree = [
            next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
            for x, y in zip(first, tokens, strict=True)
        ]
        row |= {"equal_tokens": sum(agree) / len(agree)}  # before the first that differs from the first mode's
        record(args.results, {"mode": mode, "room": args.room, **row, **held})
        print(f"{mode:10}" + " ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
