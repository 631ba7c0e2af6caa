"""Does anything grow, or slow down, while an engine runs for long?

Question: pages, host memory, compilations and throughput over minutes of random requests. Varied: prompt and output
lengths, sampling (greedy, random, truncated, penalties, logprobs), and a tenth of the requests aborted at a random
moment. Held: shape with random weights, `--outstanding` requests at any time, the engine's defaults. Expected: no page
in use at the end, nothing compiled twice, host memory and tokens per second flat.

    python -m experiments.soak [--shape llama3.2-1b] [--seconds 360] [--outstanding 300] [--small]

One line a window; the last line compares windows of the last third with those of the second (the first one warms up),
and the exit code is 1 where pages leak, something compiles twice, memory grows by over 5 % or tokens per second fall by
over 10 %. A mixture of sampling features compiles when a batch first has it, at any time. Rows go to
`results/soak.jsonl`.
"""

import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from pagedjax import LLM, SamplingParams
from pagedjax.bench import environment
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine
from pagedjax.request import Request, Status

from .common import Parser, record, shape_path

SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 50},
    {"temperature": 0, "repetition_penalty": 1.1},
    {"temperature": 0, "logprobs": 5},
)
SHARES = (0.5, 0.3, 0.1, 0.05, 0.05)
ABORTED = 0.1
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_pages": 20, "max_model_len": 128}


class Load:
    """Random requests, so many at any time."""

    def __init__(self, engine: Engine, outstanding: int, max_len: int, seed: int):
        self.engine, self.outstanding, self.max_len = engine, outstanding, max_len
        self.rng = np.random.default_rng(seed)
        self.live: set[Request] = set()
        self.num_added = self.num_aborted = 0

    def fill(self) -> None:
        vocab_size = self.engine.runner.model.config.vocab_size
        while len(self.live) < self.outstanding:
            prompt, output = self.rng.integers(1, self.max_len // 2, 2)
            which = self.rng.choice(len(SAMPLING), p=SHARES)
            params = SamplingParams(max_tokens=int(output), ignore_eos=True, detokenize=False, **SAMPLING[which])
            prompt_ids = self.rng.integers(0, vocab_size, prompt).tolist()
            self.live.update(self.engine.add_request(str(self.num_added), prompt_ids, params))
            self.num_added += 1

    def step(self) -> int:
        """One step of the engine, and at times an abort; how many tokens came."""
        progressed = self.engine.step()
        self.live.difference_update(request for request in progressed if request.status is Status.FINISHED)
        num_tokens = sum(request.finish_reason != "abort" for request in progressed)
        finished = sum(request.status is Status.FINISHED for request in progressed)
        for _ in range(self.rng.binomial(finished, ABORTED)):
            request = next(iter(self.live), None)
            if request is not None:
                self.engine.abort([request])
                self.num_aborted += 1
        return num_tokens


def resident_bytes() -> int:
    """Of this process, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(load: Load, seconds: float, window: float) -> list[dict[str, Any]]:
    """Rows of windows, printed as they come."""
    rows = []
    begin = time.perf_counter()
    while (start := time.perf_counter()) - begin < seconds:
        num_tokens = 0
        while (now := time.perf_counter()) - start < window:
            load.fill()
            num_tokens += load.step()
        gc.collect()
        row = {
            "at_s": now - begin,
            "tokens_per_s": num_tokens / (now - start),
            "resident_mib": resident_bytes() / 2**20,
            "pages_used": load.engine.pool.num_used,
            "compilations": load.engine.num_compilations,
            "requests": load.num_added,
            "aborted": load.num_aborted,
            "preemptions": load.engine.scheduler.stats.num_preemptions,
        }
        rows.append(row)
        print(" ".join(f"{name} {value:.0f}" for name, value in row.items()), flush=True)
    return rows


def drain(load: Load) -> int:
    """Ends all requests; the pages still in use."""
    load.engine.abort(load.live)
    while load.engine.has_unfinished:
        load.engine.step()
    load.engine.check_integrity()
    return load.engine.pool.num_used


def verdict(rows: list[dict[str, Any]], leaked: int, recompiled: int) -> dict[str, Any]:
    """The last third of the windows beside the second."""
    third = len(rows) // 3
    earlier, later = rows[third : 2 * third], rows[2 * third :]

    def change(name: str) -> float:
        return float(np.median([r[name] for r in later]) / np.median([r[name] for r in earlier]) - 1)

    result = {
        "leaked_pages": leaked,
        "compiled_again": recompiled,
        "memory_change": change("resident_mib"),
        "speed_change": change("tokens_per_s"),
    }
    flat = result["memory_change"] <= 0.05 and result["speed_change"] >= -0.1
    return result | {"ok": flat and not leaked and not recompiled}


def main() -> int:
    parser = Parser("soak", __doc__, small="a tiny pool, so that it preempts")
    parser.add_argument("--shape", default="llama3.2-1b", help="a named shape, or a config.json")
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--window", type=float, default=10)
    parser.add_argument("--outstanding", type=int, default=300)
    parser.add_argument("--max-len", type=int, default=2048, help="of prompt and output together")
    args = parser.parse_args()
    if args.small:
        args.outstanding, args.max_len = 20, 100
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    settings: dict[str, Any] = SMALL if args.small else {"max_model_len": args.max_len}
    llm = LLM(model=shape_path(args.shape), load_format="dummy", skip_tokenizer_init=True, **settings)
    llm.engine.warm_up(progress=False)
    load = Load(llm.engine, args.outstanding, args.max_len, seed=0)
    rows = soak(load, args.seconds, args.window)
    recompiled = sum(count - 1 for count in llm.engine.runner.compilations.values())
    result = verdict(rows, drain(load), recompiled)
    print(json.dumps(result))
    record(args.results, {"shape": args.shape, **environment(), "windows": rows, **result})
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
