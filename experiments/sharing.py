"""What do shared pages buy, and what does looking for them cost?

Questions:
  prefix   output tokens per second of `--requests` requests that begin with the same 80 or 341 tokens (the paper's one
           and five examples before a sentence to translate, its Fig 16), with prefix caching and without;
  cost     the same of workloads that share nothing, which shows what hashing and looking up cost;
  samples  the share of pages that sharing saves, averaged over steps, with n samples of a prompt (the paper's Fig 15);
  beams    the same of beam searches.
Varied: caching, the prefix, n and beam width, workload. Held: shape with random weights, `pagedjax bench`'s terms; own
parts of prompts and outputs of 16 to 48 tokens each behind a prefix; for samples and beams `--first` requests of a
workload, drawn anew for each trial, all at once, without prefix caching. Expected: 1.8x or more with 341 tokens; cost
under 1 %; n samples save the prompt's pages n - 1 times, beams most of what they would take.

    python -m experiments.sharing [--shape llama3-8b] [--question prefix cost samples beams] [--small]

Of beams with random weights: all next tokens are about as likely, so beams change parents more often than a trained
model's. Rows go to `results/sharing.jsonl`, one a trial.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pagedjax import BeamSearchParams, SamplingParams
from pagedjax.bench import Lengths, Workload, load_workload, run_workload
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine

from .common import Parser, conditions, engine_config, make_engine, record, shape_path

PREFIXES, OWN = (80, 341), (16, 48)
WIDTHS = 2, 4, 6
# The paper's figures 15 and 16: % of memory saved, of ShareGPT the ends of what it gives, and times the throughput.
PAPER_SAVED = {
    ("samples", "alpaca"): {2: 6.09, 4: 8.53, 6: 9.79},
    ("samples", "sharegpt"): {2: 16.2, 6: 30.5},
    ("beams", "alpaca"): {2: 37.56, 4: 53.13, 6: 55.16},
    ("beams", "sharegpt"): {2: 44.3, 6: 66.3},
}
PAPER_PREFIX = {80: 1.67, 341: 3.58}
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


def own_lengths(seed: int, count: int) -> Lengths:
    """Prompt and output tokens of so many requests behind a common prefix."""
    return np.random.default_rng(seed).integers(*OWN, (2, count), endpoint=True).T.tolist()


def prefix(engine: Engine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    vocab_size = engine.runner.model.config.vocab_size
    for count in (0, *PREFIXES):
        for trial in range(args.repeat + 1):  # the first one warms up
            rng, lengths = np.random.default_rng(trial), own_lengths(trial, args.requests)
            shared = rng.integers(0, vocab_size, count).tolist()
            prompts = [shared + rng.integers(0, vocab_size, n).tolist() for n, _ in lengths]
            rates: dict[bool, float] = {}
            for caching in (True, False):
                set_caching(engine, caching)
                rates[caching] = rate(engine, prompts, [output for _, output in lengths])
            if trial:
                yield {"prefix": count, "requests": args.requests, "seed": trial, **compared(rates)}


def compared(rates: dict[bool, float]) -> dict[str, float]:
    return {"tokens_per_s": rates[True], "tokens_per_s_off": rates[False], "ratio": rates[True] / rates[False]}


def cost(engine: Engine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workload in args.workload:
        for trial in range(args.repeat + 1):
            rates: dict[bool, float] = {}
            for caching in (True, False):  # in turns, so that what drifts does so for both
                set_caching(engine, caching)
                rates[caching] = run_workload(engine, cut(workload, args), seed=trial)["output_tokens_per_s"]
            if trial:
                yield {"workload": workload, "seed": trial, **compared(rates)}


def saved(engine: Engine, lengths: Lengths, seed: int, add: Callable[[str, list[int], int], Any]) -> dict[str, Any]:
    """Of pages that would be used without sharing, the share that it saves; means over steps."""
    rng, vocab_size = np.random.default_rng(seed), engine.runner.model.config.vocab_size
    set_caching(engine, False)
    before = engine.scheduler.stats.num_preemptions
    for i, (prompt, output) in enumerate(lengths):
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
        "preemptions": engine.scheduler.stats.num_preemptions - before,
        "seed": seed,
    }


def samples(engine: Engine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workload in args.workload:
        for n in WIDTHS:

            def add(name: str, prompt: list[int], output: int, n: int = n) -> None:
                params = SamplingParams(n=n, max_tokens=output, ignore_eos=True, detokenize=False)
                engine.add_request(name, prompt, params)

            for seed, lengths in drawn(workload, args):
                yield {"workload": workload, "n": n, **saved(engine, lengths, seed, add)}


def beams(engine: Engine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workload in args.workload:
        for width in WIDTHS:

            def add(name: str, prompt: list[int], output: int, width: int = width) -> None:
                params = BeamSearchParams(beam_width=width, max_tokens=output, ignore_eos=True)
                engine.add_beam_search(name, prompt, params)

            for seed, lengths in drawn(workload, args):
                yield {"workload": workload, "beam_width": width, **saved(engine, lengths, seed, add)}


def drawn(name: str, args: argparse.Namespace) -> Iterator[tuple[int, Lengths]]:
    """For each trial its seed, and `--first` requests of a workload."""
    lengths = cut(name, args).lengths
    for seed in range(args.repeat):
        chosen = np.random.default_rng(seed).permutation(len(lengths))[: args.first]
        yield seed, [lengths[i] for i in chosen]


def cut(name: str, args: argparse.Namespace) -> Workload:
    """A workload, or as much of it as a small run has time for."""
    workload = load_workload(name, 4 if args.small else None)
    return Workload(name, [(min(p, 60), min(o, 20)) for p, o in workload.lengths]) if args.small else workload


QUESTIONS = {"prefix": prefix, "cost": cost, "samples": samples, "beams": beams}


def main() -> None:
    parser = Parser("sharing", __doc__, small="few short requests")
    parser.add_argument("--shape", default="llama3-8b", help="a named shape, or a config.json")
    parser.add_argument("--question", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--workload", nargs="+", default=["alpaca-like-1000", "sharegpt-like-256"])
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--first", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if args.small:
        args.requests, args.repeat = 8, 1
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    held, settings = conditions(), SMALL if args.small else {"max_model_len": 4096}
    engine = make_engine(shape_path(args.shape, args.small), **settings)
    held |= {"shape": args.shape, "config": engine_config(engine)}
    engine.warm_up(progress=False)
    for name in args.question:
        for result in QUESTIONS[name](engine, args):
            row = {"question": name, **result}
            print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            record(args.results, row | held)


if __name__ == "__main__":
    main()
