"""How many bytes of keys and values do sequences take, by what formula, and as allocated?

Questions:
  lengths  one sequence of so many tokens: by the model's configuration alone, 2 (K and V) x layers x KV heads x head
           size x bytes of a number for each token; by the arrays of an actual pool of pages; by the growth of the
           device's memory in use;
  crowd    requests of ShareGPT's lengths, each at a random moment of its life: the same for pages, and for dense rows
           of the context's length, which are pages that long.
Varied: model, tokens, layout; for a crowd the requests, by the trial's seed, the more likely to be there the longer
their output. Held: bfloat16, pages of 16, rows of 2048. A pool that is larger than the free memory is allocated as far
as it fits, and the row says how far (`pages` of `pages_wanted`). Tokens may be more than a model was trained for.
Expected: 800 KB a token of OPT-13B (the PagedAttention paper, arXiv 2309.06180, section 3), 1.7 GB a sequence of 2048
of LLaMA-13B; what is allocated is the formula's for all tokens, and a page or two; a crowd's dense rows take 5 times as
much as its pages; 8 KV heads instead of 64 make a token of LLaMA-2-70B cheaper than one of LLaMA-13B.

    python -m experiments.kv_memory [--model llama-13b llama3-8b ...] [--question lengths crowd] [--small]

Rows go to `results/kv_memory.jsonl`, one a trial.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

from pagedjax.bench import load_workload, package_data
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.kv_cache import make_kv_cache
from pagedjax.models.config import LlamaConfig
from pagedjax.models.load import open_checkpoint, read_config

from .common import Parser, conditions, record

DTYPE, ITEMSIZE, PAGE_SIZE, ROW = "bfloat16", 2, 16, 2048
LAYOUTS = {"pages": (PAGE_SIZE, 1), "dense": (ROW, 0)}  # page size; null pages, which a paged pool has
FITS = 0.95  # of the memory that is free
SMALL_BYTES, CPU_BYTES = 1 << 27, 1 << 31  # at most, on a CPU, which has no pool of its own
HEADER = f"{'model':12} KB/token {'tokens':>7} layout wanted, GB  of tokens   formula  arrays  in use, GB  fits"


class Shape(NamedTuple):
    """What of a model decides the size of its KV cache."""

    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int


PUBLIC = {  # by their papers; those of pagedjax/shapes come with the package
    "opt-13b": Shape(40, 40, 40, 128),  # arXiv 2205.01068, table 1
    "llama-13b": Shape(40, 40, 40, 128),  # arXiv 2302.13971, table 2
    "llama-65b": Shape(80, 64, 64, 128),  # the same
    "llama2-70b": Shape(80, 64, 8, 128),  # arXiv 2307.09288, table 1 and appendix A.2.1: grouped queries, 8 KV heads
}
PACKAGED = ["llama2-7b", "llama3-8b", "llama3.2-1b"]


def model_config(model: str) -> LlamaConfig:
    """A packaged shape's configuration, or one that is like a published model's as far as KV goes."""
    if model not in PUBLIC:
        return read_config(open_checkpoint(str(package_data("shapes", model)))[0])
    shape = PUBLIC[model]
    sizes = {"num_layers": shape.layers, "num_q_heads": shape.q_heads, "num_kv_heads": shape.kv_heads}
    return replace(model_config("llama2-7b"), **sizes, head_dim=shape.head_dim)


def bytes_per_token(config: LlamaConfig) -> int:
    """The formula."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * ITEMSIZE


def bytes_in_use() -> int | None:
    """Of the device's memory; None of a device that does not say."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else None


def room(cpu_bytes: int) -> int:
    """Bytes that a pool may take."""
    stats = jax.devices()[0].memory_stats()
    return int(FITS * (stats["bytes_limit"] - stats["bytes_in_use"])) if stats else cpu_bytes


def allocate(config: LlamaConfig, layout: str, pages: int, most_bytes: int) -> dict[str, Any]:
    """Makes a pool with room for so many pages, or as many as fit, and lets it go."""
    page_size, null_pages = LAYOUTS[layout]
    page_bytes = page_size * bytes_per_token(config)
    fit = min(pages, most_bytes // page_bytes - null_pages)
    values = {"pages_wanted": pages, "pages": max(fit, 0), "wanted_bytes": pages * page_bytes}
    if fit < 1:
        return values | {"formula_bytes": 0, "array_bytes": 0, "in_use_bytes": None}
    before = bytes_in_use()
    kv = jax.block_until_ready(make_kv_cache(config, fit + null_pages, page_size, DTYPE))
    after = bytes_in_use()
    grown = None if before is None or after is None else after - before
    arrays = sum(layer.nbytes for layer in kv.layers)
    return values | {"formula_bytes": (fit + null_pages) * page_bytes, "array_bytes": arrays, "in_use_bytes": grown}


def draw(workload: str, num_requests: int, seed: int) -> list[int]:
    """How many tokens each request of a crowd holds."""
    rng = np.random.default_rng(seed)
    prompts, outputs = np.array(load_workload(workload).lengths).T
    chosen = rng.choice(len(outputs), num_requests, p=outputs / outputs.sum())
    return (prompts[chosen] + rng.integers(0, outputs[chosen])).tolist()


def cases(args: argparse.Namespace) -> Iterator[list[tuple[dict[str, Any], list[int]]]]:
    """What varies, and the tokens of each sequence; trials of the same stand together."""
    for model in args.model:
        for length in args.tokens if "lengths" in args.question else ():
            case = {"question": "lengths", "model": model, "layout": "pages", "page_size": PAGE_SIZE}
            yield [(case | {"seed": seed}, [length]) for seed in range(args.repeat)]
        for layout, (size, _) in LAYOUTS.items() if "crowd" in args.question else ():
            case = {"question": "crowd", "model": model, "layout": layout, "page_size": size, "workload": args.workload}
            yield [(case | {"seed": n}, draw(args.workload, args.crowd, n)) for n in range(args.repeat)]


def trial(case: dict[str, Any], lens: list[int], cpu_bytes: int) -> dict[str, Any]:
    config, size = model_config(case["model"]), case["page_size"]
    each, tokens, pages = bytes_per_token(config), sum(lens), sum(-(-length // size) for length in lens)
    counts = {"sequences": len(lens), "tokens": tokens, "bytes_per_token": each, "token_bytes": tokens * each}
    return case | counts | allocate(config, case["layout"], pages, room(cpu_bytes))


def line(rows: list[dict[str, Any]]) -> str:
    """Medians of trials."""
    first = rows[0]
    gb = {k: median(r[f"{k}_bytes"] for r in rows) / 1e9 for k in ("wanted", "token", "formula", "array")}
    grown = [row["in_use_bytes"] / 1e9 for row in rows if row["in_use_bytes"] is not None]
    in_use = f"{median(grown):7.3f}" if grown else "      -"
    fits = median(row["pages"] / row["pages_wanted"] for row in rows)
    return (
        f"{first['model']:12} {first['bytes_per_token'] / 1024:8.0f} {median(row['tokens'] for row in rows):7.0f} "
        f"{first['layout']:6} {gb['wanted']:10.3f} {gb['wanted'] / gb['token']:9.1%}   "
        f"{gb['formula']:7.3f} {gb['array']:7.3f} {in_use}    {fits:7.0%}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("kv_memory", __doc__, small="short sequences, a crowd of four")
    parser.add_argument("--model", nargs="+", default=[*PUBLIC, *PACKAGED], choices=[*PUBLIC, *PACKAGED])
    parser.add_argument("--question", nargs="+", default=["lengths", "crowd"], choices=["lengths", "crowd"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384, 131072])
    parser.add_argument("--workload", default="sharegpt-like-1000", help="of the crowd; requests of up to 2048 tokens")
    parser.add_argument("--crowd", type=int, default=256, help="requests")
    parser.add_argument("--cpu-bytes", type=int, default=CPU_BYTES, help="that a pool may take where there is no GPU")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args(argv)
    if args.small:
        args.tokens, args.crowd, args.cpu_bytes, args.repeat = [64, 256], 4, SMALL_BYTES, 1
    longest = load_workload(args.workload).max_len
    if longest > ROW:
        parser.error(f"--workload {args.workload} has a request of {longest} tokens; accepted: up to {ROW}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    held = {"dtype": DTYPE} | conditions()
    print(HEADER)
    for trials in cases(args):
        rows = [trial(case, lens, args.cpu_bytes) for case, lens in trials]
        for row in rows:
            record(args.results, row | held)
        print(line(rows), flush=True)


if __name__ == "__main__":
    main()
