"""Does a long prompt that arrives stall the others' tokens?

Question: time to first token, time per output token and time between tokens, when requests arrive at random at a share
of the rate that the engine can serve. Varied: the share. Held: workload, shape with random weights, greedy, exact
output lengths, the engine's defaults; the rate comes from a run with all requests at once, unless given. Expected: the
99th percentile of the time between tokens stays under three times the median at every share.

    python -m experiments.latency [--shape llama3-8b] [--workload sharegpt-like-1000] [--share 0.25 0.5 0.75]

With --num-requests each run has only so many. Rows go to `results/latency.jsonl`, one a share; None is all at once.
"""

import argparse
import math
from pathlib import Path

from pagedjax import LLM
from pagedjax.bench import load_workload, run_workload
from pagedjax.config import EngineConfig, request_memory_fraction

from .common import conditions, record, shape_path


def main() -> None:
    parser = argparse.ArgumentParser(description="latencies of requests that arrive at random")
    parser.add_argument("--shape", default="llama3-8b", help="a named shape, or a config.json")
    parser.add_argument("--workload", default="sharegpt-like-1000")
    parser.add_argument("--num-requests", type=int)
    parser.add_argument("--share", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--rate", type=float, help="requests a second that the engine can serve")
    parser.add_argument("--max-mixed-tokens", type=int, help="instead of the default")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "latency.jsonl")
    args = parser.parse_args()
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    held = conditions()
    workload = load_workload(args.workload, args.num_requests)
    engine = LLM(
        model=shape_path(args.shape),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=workload.max_len,
        max_mixed_tokens=args.max_mixed_tokens,
        enable_prefix_caching=False,
    ).engine
    engine.warm_up(progress=False)
    run_workload(engine, workload, seed=0)
    saturated = args.rate or 0.0
    print(f"{held['device']}, {args.shape}, {workload.name}, {len(workload.lengths)} requests; p50 / p99 in ms")
    print(f"{'share':>5} {'per s':>6} {'TTFT':>16} {'TPOT':>14} {'ITL':>14} {'p99/p50':>7}")
    for share in args.share if args.rate else (None, *args.share):
        rate = math.inf if share is None else share * saturated
        result = run_workload(engine, workload, seed=1, request_rate=rate)
        saturated = saturated or len(workload.lengths) / result["seconds"]
        shown = {name: result[f"{name}_ms"] for name in ("ttft", "tpot", "itl")}
        ttft, tpot, itl = (f"{values['p50']:.1f} / {values['p99']:.1f}" for values in shown.values())
        ratio = shown["itl"]["p99"] / shown["itl"]["p50"]
        print(
            f"{share or 'all':>5} {min(rate, saturated):6.1f} {ttft:>16} {tpot:>14} {itl:>14} {ratio:7.2f}", flush=True
        )
        row = {"shape": args.shape, "workload": workload.name, "requests": len(workload.lengths), "share": share}
        row |= {"rate": rate if share else None, "max_mixed_tokens": engine.config.max_mixed_tokens, **result, **held}
        record(args.results, row)


if __name__ == "__main__":
    main()
