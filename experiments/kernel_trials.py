"""What `experiments.kernels` runs, on which inputs, and how it is timed."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax.bench import load_workload
from pagedjax.pallas_kernels.cases import BENCHMARKS, GQA, Benchmark
from pagedjax.pallas_kernels.paged_attention_reference import paged_decode_reference

SCALE = 0.125  # a power of two: JAX's kernel has no scale, and gets it in K without rounding
REFERENCE_TOKENS = 1 << 16  # KV tokens, summed over rows, that the reference gathers
GOAL_DEVICE, GOAL_COPY = "NVIDIA H200", 4.27  # the goals' card, and the TB/s that it copied
REPEATS, IN_FLIGHT, SEED, WORKLOAD = 7, 4, 0, "sharegpt-like-256"
Result = tuple[float, np.ndarray]  # seconds, and the output for the first set of pages


class Trial(NamedTuple):
    """One of `cases.BENCHMARKS`, or sequences of `kv_lens`."""

    kind: str
    batch: int
    kv_len: int  # of the longest
    num_q_heads: int
    num_kv_heads: int
    page_size: int
    head_dim: int
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


def trial(b: Benchmark, **more: Any) -> Trial:
    shape = b.case.num_q_heads, b.case.num_kv_heads, b.case.page_size, b.case.head_dim
    return Trial(b.kind, b.batch, b.kv_len, *shape, b.fa3, b.goal, **more)


def all_trials() -> list[Trial]:
    """The benchmarks, and a ragged decode batch beside an even one of as many tokens."""
    requests = np.random.default_rng(SEED).permutation(load_workload(WORKLOAD).lengths)
    ragged = [int(prompt + output // 2) for prompt, output in requests]
    even = np.diff(np.arange(len(ragged) + 1) * sum(ragged) // len(ragged)).tolist()
    return [
        *map(trial, BENCHMARKS),
        *(
            trial(Benchmark("decode", len(n), max(n), GQA), label=label, kv_lens=tuple(n))
            for label, n in (("even", even), ("ragged", ragged))
        ),
    ]


class Inputs(NamedTuple):
    q: jax.Array  # [B, Hq, D], or [B * kv_len, Hq, D] in prefill
    kv: jax.Array  # [P, 2, Hkv, page_size, D]
    tables: list[jax.Array]  # sets of disjoint pages, each i32 [B, pages_per_seq]
    lens: tuple[jax.Array, ...]  # kv_lens, and in prefill cu_q_lens
    num_calls: int  # of a timed launch: some 4 ms, in whole turns of the sets


def make_inputs(case: Trial) -> Inputs:
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


def reference_rows(case: Trial, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
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
    op = jax.jit(op)

    def chain(q, held, sets):
        first = q = op(q, held, sets[0])
        for i in range(1, inputs.num_calls):
            q = op(q, held, sets[i % len(sets)])
        return q, first

    chained = jax.jit(chain)  # with its first output, since compiling takes longer than all runs
    out = np.asarray(chained(q, held, sets)[1], np.float32).reshape(inputs.q.shape)
    seconds = median_seconds(lambda: chained(q, held, sets), jax.block_until_ready)
    return seconds / inputs.num_calls, out


def run_paged(case: Trial, inputs: Inputs, ops: dict[str, Callable], tiles: Any = None, **decode_only) -> Result:
    """Our own ops, by kind of case."""
    options = {"scale": SCALE} | ({"tiles": tiles} if tiles else {}) | (decode_only if case.kind == "decode" else {})
    op, held = partial(ops[case.kind], **options), (inputs.kv, inputs.lens)
    return timed(inputs, lambda q, held, table: op(q, held[0], table, *held[1]), inputs.q, held, inputs.tables)
