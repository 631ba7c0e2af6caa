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
import importlib
import json
import math
import subprocess
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial, reduce
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax.bench import environment, load_workload
from pagedjax.pallas_kernels.dispatch import PAGED_DECODE, PAGED_PREFILL
from pagedjax.pallas_kernels.paged_attention_reference import paged_decode_reference
from pagedjax.pallas_kernels.paged_decode import paged_decode_mosaic
from pagedjax.pallas_kernels.paged_prefill import paged_prefill_mosaic
from pagedjax.pallas_kernels.tuning import DecodeTiles, PrefillTiles, Shape

SCALE = 0.125  # a power of two: JAX's kernel has no scale, and gets it in K without rounding
REFERENCE_TOKENS = 1 << 16  # KV tokens, summed over rows, that the reference gathers
MAX_ERROR = 1e-2  # rounding to bf16 gives 2e-3 to 4e-3
GOAL_DEVICE, GOAL_COPY = "NVIDIA H200", 4.27  # the goals' card, and the TB/s that it copied
REPEATS, IN_FLIGHT, SEED, WORKLOAD = 7, 4, 0, "sharegpt-like-256"
DECODE_RINGS = [(128, 3, 132), (128, 2, 132), (64, 6, 132), (64, 4, 132), (64, 3, 264), (64, 2, 264)]
DECODE_RINGS += [(128, 3, 264), (128, 6, 132), (256, 3, 132)]  # fit at head size 64
Result = tuple[float, np.ndarray]  # seconds, and the output for the first set of pages
PREFILL_CANDIDATES = [PrefillTiles(*ring, 132, n) for ring in ((128, 2), (64, 4)) for n in (0, 16, 1 << 20)]


class Case(NamedTuple):
    """Sequences of `kv_len` tokens, or of `kv_lens`; goals are microseconds in decode, TFLOP/s in prefill."""

    kind: str
    batch: int
    kv_len: int  # of the longest
    num_q_heads: int = 32
    num_kv_heads: int = 8
    page_size: int = 16
    head_dim: int = 128
    fa3: float | None = None
    goal: float | None = None
    label: str = ""
    kv_lens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        shape = self.label or f"{self.batch}x{self.kv_len}"
        return f"{self.kind}-{shape}-{self.num_q_heads}/{self.num_kv_heads}-p{self.page_size}-d{self.head_dim}"

    @property
    def lens(self) -> np.ndarray:
        return np.asarray(self.kv_lens or [self.kv_len] * self.batch, np.int32)

    @property
    def work(self) -> float:
        """In units of 1e12: bytes of K and V read in decode, causal floating-point operations in prefill."""
        flops = 4 * self.batch * self.kv_len**2 / 2 * self.num_q_heads * self.head_dim
        return (int(self.lens.sum()) * 4 * self.num_kv_heads * self.head_dim if self.kind == "decode" else flops) / 1e12

    def goal_on(self, device: str, copy: float) -> float | None:
        """The goal for a card of that name and copy rate in TB/s."""
        if self.goal is None or self.kind == "prefill" or device == GOAL_DEVICE:
            return self.goal
        return round(self.goal + self.work * (1 / copy - 1 / GOAL_COPY) * 1e6, 1)


def all_cases() -> list[Case]:
    decode, prefill = partial(Case, "decode"), partial(Case, "prefill")
    requests = np.random.default_rng(SEED).permutation(load_workload(WORKLOAD).lengths)
    ragged = [int(prompt + output // 2) for prompt, output in requests]
    even = np.diff(np.arange(len(ragged) + 1) * sum(ragged) // len(ragged)).tolist()
    return [
        *(decode(64, 2048, page_size=n) for n in (8, 32, 128)),
        *(decode(64, 2048, page_size=n, fa3=fa3, goal=130) for n, fa3 in ((16, 184), (64, 186), (256, 165))),
        *(decode(256, 1024, num_kv_heads=n, fa3=fa3, goal=goal) for n, fa3, goal in ((8, 308, 256), (32, 1053, 1000))),
        *(decode(64, n, num_kv_heads=32, fa3=fa3, goal=goal) for n, fa3, goal in ((2048, 540, 497), (512, 170, 135))),
        *(decode(b, n, fa3=f, goal=g) for b, n, f, g in ((8, 8192, 116, 72), (1, 8192, 65, 20), (1, 131072, 173, 138))),
        decode(64, 2048, head_dim=64, fa3=128, goal=72),
        *(decode(len(n), max(n), label=label, kv_lens=tuple(n)) for label, n in (("even", even), ("ragged", ragged))),
        *(prefill(4, 2048, num_kv_heads=n, fa3=fa3, goal=goal) for n, fa3, goal in ((8, 465, 520), (32, 439, 480))),
        *(prefill(b, n, fa3=fa3, goal=goal) for b, n, fa3, goal in ((1, 8192, 619, 640), (16, 512, 229, 320))),
        prefill(4, 2048, head_dim=64, fa3=316, goal=330),
        prefill(4, 2048, page_size=8, goal=480),
    ]


class Inputs(NamedTuple):
    q: jax.Array  # [B, Hq, D], or [B * kv_len, Hq, D] in prefill
    kv: jax.Array  # [P, 2, Hkv, page_size, D]
    tables: list[jax.Array]  # sets of disjoint pages, each i32 [B, pages_per_seq]
    lens: tuple[jax.Array, ...]  # kv_lens, and in prefill cu_q_lens
    num_calls: int  # of a timed launch: some 4 ms, in whole turns of the sets


def make_inputs(case: Case) -> Inputs:
    """Random pages and queries; as many sets of pages as exceed four times L2."""
    num_pages = -(-case.lens // case.page_size)
    set_bytes = int(num_pages.sum()) * case.page_size * case.num_kv_heads * case.head_dim * 4
    num_sets = min(24, 1 + int(4 * 60e6 / set_bytes))
    total = num_sets * int(num_pages.sum())
    estimate = 5e-6 + case.work / (4 if case.kind == "decode" else 500)
    num_calls = -(-max(4, min(48, int(4e-3 / estimate))) // num_sets) * num_sets
    tables = np.zeros((num_sets, case.batch, num_pages.max()), np.int32)
    pages = np.random.default_rng(SEED).permutation(total) + 1
    tables[:, np.arange(num_pages.max()) < num_pages[:, None]] = pages.reshape(num_sets, -1)
    normal = jax.jit(partial(jax.random.normal, dtype=jnp.bfloat16), static_argnums=1)
    tokens, lens = case.batch, (jnp.asarray(case.lens),)
    if case.kind == "prefill":
        tokens, lens = tokens * case.kv_len, (*lens, jnp.arange(case.batch + 1, dtype=jnp.int32) * case.kv_len)
    key = partial(jax.random.key, impl="rbg")  # compiles sooner
    q = normal(key(1), (tokens, case.num_q_heads, case.head_dim))
    kv = normal(key(0), (1 + total, 2, case.num_kv_heads, case.page_size, case.head_dim))
    return Inputs(q, kv, [jnp.asarray(table) for table in tables], lens, num_calls)


def reference_rows(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of q, and their outputs by definition: a query of prefill is a decode query at its position."""
    count = max(1, min(len(inputs.q), REFERENCE_TOKENS // case.kv_len))
    rows = np.linspace(0, len(inputs.q) - 1, count).astype(np.int32)
    seqs, lens = (rows, case.lens[rows]) if case.kind == "decode" else (rows // case.kv_len, rows % case.kv_len + 1)
    args = inputs.q[rows].astype(jnp.float32), inputs.kv, inputs.tables[0][seqs], jnp.asarray(lens)
    return rows, np.asarray(jax.jit(partial(paged_decode_reference, scale=SCALE))(*args))


def median_seconds(launch: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Of one launch, with several in flight; the first two rounds warm up."""
    times = [time.perf_counter()]
    for _ in range(2 + REPEATS):
        wait([launch() for _ in range(IN_FLIGHT)])
        times.append(time.perf_counter())
    return float(np.median(np.diff(times)[2:])) / IN_FLIGHT


def timed(inputs: Inputs, op: Callable[..., jax.Array], q: jax.Array, held: Any, sets: list) -> Result:
    """`op(q, held, set)`, chained through q. No array is a constant, of which XLA would compute too much early."""
    calls, op = range(inputs.num_calls), jax.jit(op)
    chained = jax.jit(lambda q, held, sets: reduce(lambda q, i: op(q, held, sets[i % len(sets)]), calls, q))
    out = np.asarray(op(q, held, sets[0]), np.float32).reshape(inputs.q.shape)
    return median_seconds(lambda: chained(q, held, sets), jax.block_until_ready) / len(calls), out


def run_paged(case: Case, inputs: Inputs, ops: dict[str, Callable], tiles: Any = None, **decode_only) -> Result:
    """Our own ops, by kind of case."""
    options = {"scale": SCALE} | ({"tiles": tiles} if tiles else {}) | (decode_only if case.kind == "decode" else {})
    op, held = partial(ops[case.kind], **options), (inputs.kv, inputs.lens)
    return timed(inputs, lambda q, held, table: op(q, held[0], table, *held[1]), inputs.q, held, inputs.tables)


def run_jax_paged(case: Case, inputs: Inputs, k_splits: int) -> Result:
    """JAX's Triton kernel, which refuses prefill; K and V are pools of their own, `[Hkv, P, page_size, D]`."""
    kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention").paged_attention
    held = (inputs.kv[:, 0].swapaxes(0, 1) * SCALE, inputs.kv[:, 1].swapaxes(0, 1), inputs.lens[0])
    op = partial(kernel, k_splits=k_splits)
    return timed(inputs, lambda q, held, table: op(q, *held[:2], table, held[2]), inputs.q, held, inputs.tables)


def dense(case: Case, inputs: Inputs) -> tuple[jax.Array, list[tuple[jax.Array, ...]]]:
    """Queries `[B, T, Hq, D]`, and the sets' pages as dense caches of K and V, `[B, S, Hkv, D]`."""
    shape = (case.batch, -1, case.num_kv_heads, case.head_dim)
    sets = [tuple(inputs.kv[table, i].swapaxes(2, 3).reshape(shape) for i in (0, 1)) for table in inputs.tables]
    return inputs.q.reshape(case.batch, -1, case.num_q_heads, case.head_dim), sets


def run_cudnn(case: Case, inputs: Inputs) -> Result:
    """cuDNN's attention over a dense cache; padded where the batch is ragged."""
    options = {"scale": SCALE, "is_causal": case.kind == "prefill", "implementation": "cudnn"}
    attend, (q, sets) = partial(jax.nn.dot_product_attention, **options), dense(case, inputs)
    lens = inputs.lens[0] if case.kv_lens else None
    return timed(inputs, lambda q, lens, kv: attend(q, *kv, key_value_seq_lengths=lens), q, lens, sets)


def run_torch(case: Case, inputs: Inputs) -> Result:
    """torch's attention over a dense cache; a CUDA graph in place of the jit."""
    torch = importlib.import_module("torch")
    if case.kv_lens:
        raise ValueError("equal lengths only")
    q, sets = jax.tree.map(lambda x: torch.from_dlpack(x).transpose(1, 2), jax.block_until_ready(dense(case, inputs)))
    options = {"scale": SCALE, "enable_gqa": True, "is_causal": case.kind == "prefill"}
    attend = partial(torch.nn.functional.scaled_dot_product_attention, **options)
    out = attend(q, *sets[0]).transpose(1, 2).float().cpu().numpy().reshape(inputs.q.shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(inputs.num_calls):
            q = attend(q, *sets[i % len(sets)])
    return median_seconds(graph.replay, lambda _: torch.cuda.synchronize()) / inputs.num_calls, out


MOSAIC = {"decode": paged_decode_mosaic, "prefill": paged_prefill_mosaic}
XLA = {"xla": partial(run_paged, ops={"decode": PAGED_DECODE["xla"], "prefill": PAGED_PREFILL["xla"]})}
JAX_PAGED = {f"jax-paged k_splits={n}": partial(run_jax_paged, k_splits=n) for n in (1, 4, 16)}
PEERS = JAX_PAGED | XLA | {"cudnn": run_cudnn, "torch": run_torch}
HEADER = f"{'case':31} {'impl':22} {'us':>8} {'rate':>12} {'of copy':>7} {'goal':>6} {'FA3':>5} {'met':5} {'error':>7}"


def measure(case: Case, goal: float | None, run: Callable[[], Result], rows, expected, strict: bool) -> dict:
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


def candidates(case: Case, batch_invariant: bool) -> dict[str, Callable[[Case, Inputs], Result]]:
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


def conditions(copy_words: int) -> dict[str, Any]:
    """What all rows share; the copy rate is of read and written bytes."""
    run = partial(subprocess.run, check=False, capture_output=True, text=True, shell=True)
    commit = run("git describe --always --dirty").stdout.strip()
    driver = run("nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0").stdout.strip()
    x, copy = jnp.ones(copy_words, jnp.int32), jax.jit(jnp.copy)
    rate = 2 * x.nbytes / median_seconds(lambda: copy(x), jax.block_until_ready) / 1e12
    return environment() | {"commit": commit, "driver": driver, "copy_tb_s": rate, "dtype": "bfloat16", "seed": SEED}


def main() -> None:
    parser = argparse.ArgumentParser(description="times the attention kernels on one GPU")
    parser.add_argument("--cases", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--batch-invariant", action="store_true", help="decode in the batch-invariant schedule")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "kernels.jsonl")
    mode = parser.add_mutually_exclusive_group()
    for flag, text in {"peers": "time others too", "tune": "sweep tiles", "small": "tiny cases, XLA, unsaved"}.items():
        mode.add_argument(f"--{flag}", action="store_true", help=text)
    args = parser.parse_args()
    known = [Case(kind, 2, 64, 4, 2, head_dim=64) for kind in ("decode", "prefill")] if args.small else all_cases()
    matches = [[case for case in known if fnmatchcase(case.name, pattern)] for pattern in args.cases.split(",")]
    if not all(matches):
        parser.error(f"--cases {args.cases}; accepted: {', '.join(case.name for case in known)}")
    held = conditions(1 << (20 if args.small else 29)) | {"batch_invariant": args.batch_invariant}
    copy, keep = held["copy_tb_s"], Path("/dev/null") if args.small else args.results
    print(f"{held['device']}, JAX {held['jax']}, commit {held['commit']}, copy {copy:.2f} TB/s\n{HEADER}")
    ours = XLA if args.small else {"mosaic": partial(run_paged, ops=MOSAIC, batch_invariant=args.batch_invariant)}
    table, times = [], {}
    for case in dict.fromkeys(chain.from_iterable(matches)):
        inputs = make_inputs(case)
        rows, expected = reference_rows(case, inputs)
        impls = candidates(case, args.batch_invariant) if args.tune else ours | PEERS if args.peers else ours
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
