"""Which page size should one use?

Questions, one a part:
  kernels  microseconds of attention over pages in one layer: a decoding batch of 256 requests of a workload, each with
           half its output, and a causal prefill of 4 prompts of 2048 tokens;
  engine   output tokens per second, time to first token, time per token and page waste of a workload, all at once;
  prefix   the share of prompt tokens found in the prefix cache when requests come in families that begin alike
           (prefixes and own parts as long as the workload's prompts), beside what pages of one token would find.
Varied: page size, workload, shape. Held: random weights, exact output lengths, greedy; prefix caching in the last part
alone, which is the scheduler without a model, with a pool that holds everything. Expected: kernels do not care from 16
on, since a block of 64 or 128 tokens is gathered from pages by TMA copies that are all in flight together, and lose a
little at 8; waste grows as half a page a request, 2 % of ShareGPT-like requests at 16 and a quarter at 256, and costs
throughput only where the pool is full; the hit rate falls by half a page a request; the host's share is smaller with
larger pages. So 16 to 32.

    python -m experiments.page_size [--shape llama3-8b llama3.2-1b] [--page-sizes 8 16 ...] [--part ...] [--small]

Rows go to `results/page_size.jsonl`, one a trial: of the engine a seed, of kernels a median of several launches.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pagedjax.bench import Lengths, load_workload, run_workload
from pagedjax.config import platform_defaults
from pagedjax.engine import Engine
from pagedjax.models.config import LlamaConfig
from pagedjax.models.load import open_checkpoint, read_config
from pagedjax.page_pool import PagePool
from pagedjax.pallas_kernels.dispatch import PAGED_DECODE, PAGED_PREFILL
from pagedjax.prefix_cache import PrefixCache
from pagedjax.scheduler import Scheduler

from .common import Parser, conditions, engine_config, make_engine, record, shape_path
from .fragmentation import make_request, run_until
from .kernel_trials import Trial, make_inputs, run_paged
from .limit import Ceilings, limit, measure

PARTS = ("kernels", "engine", "prefix")
SIZES = [8, 16, 32, 64, 128, 256]
NUM_DECODING, PREFILL = 256, (4, 2048)  # sequences; prompts of so many tokens
NUM_FAMILIES, FAMILY_OUTPUT, VOCAB_SIZE = 32, 16, 128_256


def kernels(config: LlamaConfig, page_size: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    impl = "mosaic" if jax.default_backend() == "gpu" else "xla"
    ops = {"decode": PAGED_DECODE[impl], "prefill": PAGED_PREFILL[impl]}
    heads = config.num_q_heads, config.num_kv_heads, page_size, config.head_dim
    batch, length = (2, 64) if args.small else PREFILL
    trials = {None: Trial("prefill", batch, length, *heads)}
    for name in args.workload:
        lens = [prompt + output // 2 for prompt, output in cut(name, args)][:NUM_DECODING]
        trials[name] = Trial("decode", len(lens), max(lens), *heads, kv_lens=tuple(lens))
    for workload, trial in trials.items():
        inputs = make_inputs(trial)
        for i in range(args.repeat):
            seconds, _ = run_paged(trial, inputs, ops)
            yield {"kernel": trial.kind, "workload": workload, "trial": i, "us": seconds * 1e6, "impl": impl}


def throughput(engine: Engine, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in args.workload:
        workload = load_workload(name)
        workload = type(workload)(name, cut(name, args))
        for trial in range(args.repeat + 1):  # the first one compiles what this workload needs
            result = run_workload(engine, workload, seed=trial)
            if trial:
                yield {"workload": name, "requests": len(workload.lengths), "seed": trial, **result}


def prefix(page_size: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of the scheduler alone, with made-up tokens: what it finds depends on no model."""
    mixed = platform_defaults("gpu").max_mixed_tokens
    for name in args.workload:
        for seed in range(args.repeat):
            rng = np.random.default_rng(seed)
            lens = rng.permutation([prompt for prompt, _ in cut(name, args)])
            shared = [rng.integers(0, VOCAB_SIZE, n).tolist() for n in lens[:NUM_FAMILIES]]
            chosen = rng.integers(0, len(shared), len(lens))
            seen: set[int] = set()
            possible, requests = 0, []
            for i, (family, own) in enumerate(zip(chosen.tolist(), rng.permutation(lens).tolist(), strict=True)):
                prompt = shared[family] + rng.integers(0, VOCAB_SIZE, own).tolist()
                possible += len(shared[family]) if family in seen else 0
                seen.add(family)
                requests.append(make_request(str(i), prompt, FAMILY_OUTPUT))
            num_pages = sum(len(r.prompt_token_ids) + FAMILY_OUTPUT + page_size for r in requests) // page_size
            cache = PrefixCache(PagePool(1 + num_pages, page_size))
            scheduler = Scheduler(cache.pool, args.rows, args.max_tokens, min(mixed, args.max_tokens), cache)
            for request in requests:
                scheduler.add(request)
            run_until(scheduler, 0)
            num_tokens = sum(len(r.prompt_token_ids) for r in requests)
            found = sum(r.num_cached_tokens for r in requests)
            rates = {"hit_rate": found / num_tokens, "possible_hit_rate": possible / num_tokens}
            yield {"workload": name, "requests": len(requests), "families": len(shared), "seed": seed, **rates}


def cut(name: str, args: argparse.Namespace) -> Lengths:
    """Lengths of as many requests as are wanted, short ones in a small run."""
    lengths = load_workload(name, 12 if args.small else args.requests).lengths
    return [(min(prompt, 60), min(output, 12)) for prompt, output in lengths] if args.small else lengths


def main() -> None:
    parser = Parser("page_size", __doc__, small="two page sizes, a few short requests of a small shape")
    parser.add_argument("--shape", nargs="+", default=["llama3-8b", "llama3.2-1b"], help="named shapes")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--workload", nargs="+", default=["sharegpt-like-256", "alpaca-like-1000"])
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--requests", type=int, default=256, help="of a workload, at most")
    parser.add_argument("--rows", type=int, default=256, help="that run at a time")
    parser.add_argument("--max-tokens", type=int, default=2048, help="in a step")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if args.small:
        args.shape, args.page_sizes, args.rows, args.max_tokens = args.shape[:1], [8, 64], 4, 32
        args.repeat, args.workload = 1, args.workload[:1]
    held = conditions()
    ceilings = measure() if held["platform"] == "gpu" else None
    for shape in args.shape if {"kernels", "engine"} & set(args.part) else ():
        path = shape_path(shape, args.small)
        for page_size in args.page_sizes:
            for part, row in rows_of(path, page_size, ceilings, args):
                show({"part": part, "shape": shape, "page_size": page_size} | row, held, args)
    for page_size in args.page_sizes if "prefix" in args.part else ():
        for row in prefix(page_size, args):
            show({"part": "prefix", "shape": None, "page_size": page_size} | row, held, args)


def rows_of(
    path: str, page_size: int, ceilings: Ceilings | None, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of one shape and page size."""
    config = read_config(open_checkpoint(path)[0])
    if "kernels" in args.part:
        yield from (("kernels", row) for row in kernels(config, page_size, args))
    if "engine" in args.part:
        longest = max(sum(pair) for name in args.workload for pair in cut(name, args))
        sizes: dict[str, Any] = {"max_num_seqs": args.rows, "max_model_len": longest}
        sizes |= {"max_num_batched_tokens": args.max_tokens, "gpu_memory_utilization": 0.8}  # room to compile beside it
        if args.small:
            sizes["num_pages"] = 4096 // page_size
        engine = make_engine(path, page_size=page_size, enable_prefix_caching=False, **sizes)
        settings = {"config": engine_config(engine)}
        for row in throughput(engine, args):
            rate = limit(config, cut(row["workload"], args), ceilings) if ceilings else None
            yield "engine", row | {"limit": rate} | settings


def show(row: dict[str, Any], held: dict[str, Any], args: argparse.Namespace) -> None:
    """Keeps a row and prints what counts in it."""
    record(args.results, row | held)
    names = ("us", "output_tokens_per_s", "page_waste", "hit_rate", "possible_hit_rate")
    figures = " ".join(f"{name} {row[name]:.4g}" for name in names if name in row)
    tpot = f" TPOT p50 {row['tpot_ms']['p50']:.2f} ms" if row.get("tpot_ms") else ""
    kind = row.get("kernel") or row["part"]
    varied = f"{row['shape'] or '':11} page {row['page_size']:3} {kind:8} {row['workload'] or '':20}"
    print(f"{varied} {figures}{tpot}", flush=True)


if __name__ == "__main__":
    main()
