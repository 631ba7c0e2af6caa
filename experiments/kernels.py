"""How near to the card's limits do the Mosaic kernels come, and where are other kernels on the same card?

Question: does attention over pages reach the memory's bandwidth in decode and the tensor cores' rate in prefill?
Varied: batch, KV length, heads, head size, page size, a ragged batch beside an even one of as many tokens; with
`--peers` the implementation, with `--tune` the tiles. Held: bf16, random pages of a permuted pool, causal prefill of
whole sequences. Expected on an H200: every goal met, page size without effect from 16 on, ragged within 1.1x of even.

    python -m experiments.kernels [--peers | --tune] [--batch-invariant] [--cases 'decode-*,prefill-1x8192*']

Calls are chained in one jit (the output is the next query), sets of pages take turns so that L2 holds none of them, and
several calls are in flight. Goals and FA3 (FlashAttention-3 as vLLM builds it) are one H200's, microseconds in decode
and TFLOP/s in prefill; on another card a decode goal allows the same time beyond that of its bytes at the copy rate.
Errors, of rows spread evenly over q, are relative to the float32 reference.
"""

import argparse
import json
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pagedjax.pallas_kernels.dispatch import PAGED_DECODE, PAGED_PREFILL
from pagedjax.pallas_kernels.paged_decode import paged_decode_mosaic
from pagedjax.pallas_kernels.paged_prefill import paged_prefill_mosaic
from pagedjax.pallas_kernels.tuning import DecodeTiles, PrefillTiles, Shape

from .common import conditions
from .kernel_peers import PEERS
from .kernel_trials import (
    SEED,
    WORKLOAD,
    Inputs,
    Result,
    Trial,
    all_trials,
    make_inputs,
    reference_rows,
    run_paged,
)

MAX_ERROR = 1e-2  # rounding to bf16 gives 2e-3 to 4e-3
DECODE_RINGS = [(128, 3, 132), (128, 2, 132), (64, 6, 132), (64, 4, 132), (64, 3, 264), (64, 2, 264)]
DECODE_RINGS += [(128, 3, 264), (128, 6, 132), (256, 3, 132)]  # fit at head size 64
PREFILL_RINGS = [(128, 2), (64, 4), (128, 3)]  # the last fits at head size 64
PREFILL_CANDIDATES = [PrefillTiles(*ring, 132, n) for ring in PREFILL_RINGS for n in (0, 16, 1 << 20)]
MOSAIC = {"decode": paged_decode_mosaic, "prefill": paged_prefill_mosaic}
XLA = {"xla": partial(run_paged, ops={"decode": PAGED_DECODE["xla"], "prefill": PAGED_PREFILL["xla"]})}
HEADER = f"{'case':31} {'impl':22} {'us':>8} {'rate':>12} {'of copy':>7} {'goal':>6} {'FA3':>5} {'met':5} {'error':>7}"


def measure(case: Trial, goal: float | None, run: Callable[[], Result], rows, expected, strict: bool) -> dict:
    """A row's figures; of a failure, its first line, or if `strict` the failure itself."""
    try:
        seconds, out = run()
    except Exception as error:
        if strict:
            raise
        return {"failure": f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:160]}
    error = float(np.linalg.norm(out[rows] - expected) / np.linalg.norm(expected))
    us, rate, met = seconds * 1e6, case.work / seconds, "-"
    if goal is not None:
        met = "ok" if (us <= goal if case.kind == "decode" else rate >= goal) else "miss"
    return {"us": us, "rate": rate, "error": error, "met": met if error <= MAX_ERROR else "wrong"}


def line(row: dict[str, Any], copy: float) -> str:
    """A row under `HEADER`."""
    if "failure" in row:
        return f"{row['case']:31} {row['impl']:22} {row['failure']}"
    rate, share = f"{row['rate']:.2f} TB/s", f"{row['rate'] / copy:.0%}"
    if row["kind"] == "prefill":
        rate, share = f"{row['rate']:.0f} TFLOP/s", "-"
    start = f"{row['case']:31} {row['impl']:22} {row['us']:8.1f} {rate:>12} {share:>7}"
    return f"{start} {row['goal_here'] or '-':>6} {row['fa3'] or '-':>5} {row['met']:5} {row['error']:7.1e}"


def candidates(case: Trial, batch_invariant: bool) -> dict[str, Callable[[Trial, Inputs], Result]]:
    """Our kernel with each of the tiles worth a try."""
    tiles: list[Any] = PREFILL_CANDIDATES
    if case.kind == "decode":
        splits = (1024, 2048, 4096) if batch_invariant else (0,)
        tiles = [DecodeTiles(*ring, split_blocks=n // ring[0]) for ring in DECODE_RINGS for n in splits]
    return {f"{tuple(t)}": partial(run_paged, ops=MOSAIC, tiles=t) for t in tiles}


def print_best_tiles(rows: list[dict[str, Any]], device: str) -> None:
    """Lines for `tuning.py`: of each kind and shape the best by geometric mean over the cases, failing in none."""
    logs: dict[tuple[str, Shape], dict[str, float]] = {}
    for row in rows:
        shape = Shape(row["head_dim"], row["num_q_heads"] // row["num_kv_heads"], row["page_size"])
        sums = logs.setdefault((row["kind"], shape), {})
        log = math.log(row["us"]) if row.get("met", "wrong") != "wrong" else math.inf
        sums[row["impl"]] = sums.get(row["impl"], 0.0) + log
    for (kind, shape), by_tiles in sorted(logs.items()):
        if math.isfinite(best := min(by_tiles.values())):
            tiles = next(t for t in by_tiles if by_tiles[t] == best)
            print(f'    ("{device}", Shape{tuple(shape)}): {kind.title()}Tiles{tiles},')


def main() -> None:
    parser = argparse.ArgumentParser(description="times the attention kernels on one GPU")
    parser.add_argument("--cases", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--batch-invariant", action="store_true", help="decode in the batch-invariant schedule")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "kernels.jsonl")
    mode = parser.add_mutually_exclusive_group()
    for flag, text in {"peers": "time others too", "tune": "sweep tiles", "small": "tiny cases, XLA, unsaved"}.items():
        mode.add_argument(f"--{flag}", action="store_true", help=text)
    args = parser.parse_args()
    known = [Trial(kind, 2, 64, 4, 2, 16, 64) for kind in ("decode", "prefill")] if args.small else all_trials()
    matches = [[case for case in known if fnmatchcase(case.name, pattern)] for pattern in args.cases.split(",")]
    if not all(matches):
        parser.error(f"--cases {args.cases}; accepted: {', '.join(case.name for case in known)}")
    held = conditions() | {"dtype": "bfloat16", "seed": SEED, "batch_invariant": args.batch_invariant}
    copy, keep = held["copy_tb_s"], Path("/dev/null") if args.small else args.results
    print(f"{held['device']}, JAX {held['jax']}, commit {held['commit']}, copy {copy:.2f} TB/s\n{HEADER}")
    ours = XLA if args.small else {"mosaic": partial(run_paged, ops=MOSAIC, batch_invariant=args.batch_invariant)}
    table, times = [], {}
    for case in dict.fromkeys(chain.from_iterable(matches)):
        inputs = make_inputs(case)
        rows, expected = reference_rows(case, inputs)
        impls = candidates(case, args.batch_invariant) if args.tune else ours | XLA | PEERS if args.peers else ours
        for impl, run in impls.items():
            row = case._asdict() | {"case": case.name, "impl": impl, "workload": WORKLOAD if case.kv_lens else None}
            goal = row["goal_here"] = case.goal_on(held["device"], copy)
            row |= measure(case, goal, partial(run, case, inputs), rows, expected, strict=impl in ours)
            times[impl, case.label] = row.get("us", math.nan)
            ratio = times[impl, case.label] / times.get((impl, "even"), math.nan)
            row["ragged/even"] = ratio if case.label == "ragged" and math.isfinite(ratio) else None
            print(line(row, copy), f"{ratio:.3f} x even" if row["ragged/even"] else "", flush=True)
            table.append(row)
            with keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | held) + "\n")
    print_best_tiles(table if args.tune else [], held["device"])


if __name__ == "__main__":
    main()
