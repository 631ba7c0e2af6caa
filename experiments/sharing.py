"""What do shared pages buy, and what does looking for them cost?

Questions, one a trial:
  prefix   output tokens per second of `--requests` requests that begin with the same 80 or 341 tokens (the paper's one
           and five examples before a sentence to translate, its Fig 16), with prefix caching and without;
  cost     the same of workloads that share nothing, which shows what hashing and looking up cost;
  samples  the share of pages that sharing saves, averaged over steps, with n samples of a prompt (the paper's Fig 15);
  beams    the same of beam searches.
Varied: caching, the prefix, n and beam width, workload. Held: shape with random weights, `pagedjax bench`'s terms; own
parts of prompts and outputs of 16 to 48 tokens each behind a prefix; for samples and beams the first `--first` requests
of a workload, all at once, without prefix caching. Expected: 1.8x or more with 341 tokens; cost under 1 %; n samples
save the prompt's pages n - 1 times, beams most of what they would take.

    python -m experiments.sharing [--shape llama3-8b] [--trial prefix cost samples beams] [--small]

Of beams with random weights: all next tokens are about as likely, so beams change parents more often than a trained
model's. Rows go to `results/sharing.jsonl`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pagedjax import LLM, BeamSearchParams, SamplingParams
from pagedjax.bench import Workload, environment, load_workload, package_data, run_workload
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine

PREFIXES, OWN = (80, 341), (16, 48)
WIDTHS = 2, 4, 6
SMALL = {"max_num_seqs": 32, "max_num_batched_tokens": 128, "num_pages": 400, "max_model_len": 512}


def rate(engine: Engine, prompts: list[list[int]], lens: list[int]) -> float:
    """Output tokens per second of a run."""
    for i, (prompt, length) in enumerate(zip(prompts, lens, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        engine.add_request(str(i), prompt, params)
    start = time.perf_counter()
    while engine.has_unfinished:
        engine.step()
    return sum(lens) / (time.perf_counter() - start)


def set_caching(engine: Engine, caching: bool) -> None:
    """Of an idle engine, whose cache is emptied."""
    engine.reset_prefix_cache()
    engine.scheduler.cache = engine.prefix_cache if caching else None


def prefix(engine: Engine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    vocab_size = engine.runner.model.config.vocab_size
    for count in (0, *PREFIXES):
        rates: dict[bool, list[float]] = {True: [], False: []}
        for trial in range(args.repeat + 1):  # the first one warms up
            rng = np.random.default_rng(trial)
            lens = rng.integers(*OWN, (2, args.requests), endpoint=True)
            shared = rng.integers(0, vocab_size, count).tolist()
            prompts = [shared + rng.integers(0, vocab_size, n).tolist() for n in lens[0]]
            for caching in (True, False):
                set_caching(engine, caching)
                rates[caching].append(rate(engine, prompts, lens[1].tolist()))
        best = {caching: max(values[1:]) for caching, values in rates.items()}
        yield {
            "prefix": count,
            "requests": args.requests,
            "tokens_per_s": best[True],
            "tokens_per_s_off": best[False],
            "ratio": best[True] / best[False],
        }


def cost(engine: Engine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workload in args.workload:
        best = {True: 0.0, False: 0.0}
        for trial in range(args.repeat + 1):
            for caching in (True, False):  # in turns, so that what drifts does so for both
                set_caching(engine, caching)
                result = run_workload(engine, cut(workload, args), seed=trial)
                if trial:
                    best[caching] = max(best[caching], result["output_tokens_per_s"])
        yield {
            "workload": workload,
            "tokens_per_s": best[True],
            "tokens_per_s_off": best[False],
            "ratio": best[True] / best[False],
        }


def saved(engine: Engine, workload: Workload, add: Callable[[str, list[int], int], Any]) -> dict[str, Any]:
    """Of pages that would be used without sharing, the share that it saves; means over steps."""
    rng, vocab_size = np.random.default_rng(0), engine.runner.model.config.vocab_size
    set_caching(engine, False)
    for i, (prompt, output) in enumerate(workload.lengths):
        add(str(i), rng.integers(0, vocab_size, prompt).tolist(), output)
    used = spared = num_steps = 0
    start = time.perf_counter()
    while engine.has_unfinished:
        engine.step()
        stats = engine.page_stats()
        used, spared, num_steps = used + stats.used, spared + stats.saved, num_steps + 1
    return {
        "saved": spared / max(spared + used, 1),
        "mean_pages_used": used / num_steps,
        "steps": num_steps,
        "seconds": time.perf_counter() - start,
        "preemptions": engine.scheduler.stats.num_preemptions,
    }


def samples(engine: Engine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workload in args.workload:
        for n in WIDTHS:

            def add(name: str, prompt: list[int], output: int, n: int = n) -> None:
                params = SamplingParams(n=n, max_tokens=output, ignore_eos=True, detokenize=False)
                engine.add_request(name, prompt, params)

            yield {"workload": workload, "n": n, **saved(engine, cut(workload, args, args.first), add)}


def beams(engine: Engine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workload in args.workload:
        for width in WIDTHS:

            def add(name: str, prompt: list[int], output: int, width: int = width) -> None:
                params = BeamSearchParams(beam_width=width, max_tokens=output, ignore_eos=True)
                engine.add_beam_search(name, prompt, params)

            yield {"workload": workload, "beam_width": width, **saved(engine, cut(workload, args, args.first), add)}


def cut(name: str, args: argparse.Namespace, first: int | None = None) -> Workload:
    """A workload, or as much of it as a small run has time for."""
    workload = load_workload(name, 4 if args.small else first)
    return Workload(name, [(min(p, 60), min(o, 20)) for p, o in workload.lengths]) if args.small else workload


TRIALS = {"prefix": prefix, "cost": cost, "samples": samples, "beams": beams}


def main() -> None:
    parser = argparse.ArgumentParser(description="what shared pages save, and what they cost")
    parser.add_argument("--shape", default="llama3-8b", help="a named shape, or a config.json")
    parser.add_argument("--trial", nargs="+", default=list(TRIALS), choices=TRIALS)
    parser.add_argument("--workload", nargs="+", default=["alpaca-like-1000", "sharegpt-like-256"])
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--first", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "sharing.jsonl")
    parser.add_argument("--small", action="store_true", help="few short requests, unsaved")
    args = parser.parse_args()
    if args.small:
        args.requests, args.repeat, args.results = 8, 1, Path("/dev/null")
    model = args.shape if args.shape.endswith(".json") else str(package_data("shapes", args.shape))
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    settings: dict[str, Any] = SMALL if args.small else {"max_model_len": 4096}
    engine = LLM(model=model, load_format="dummy", skip_tokenizer_init=True, **settings).engine
    engine.warm_up(progress=False)
    for name in args.trial:
        for result in TRIALS[name](engine, args):
            row = {"trial": name, "shape": args.shape, "page_size": engine.config.page_size, **result}
            print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | environment()) + "\n")


if __name__ == "__main__":
    main()
