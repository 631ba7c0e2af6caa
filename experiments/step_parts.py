"""Where does the time of a decode step go?

Question: what do the head with the sampler, and attention with RoPE and KV write add to a step whose rest is GEMMs?
Each is left out in turn, which is also the most that fusing it into a neighbour could win. Varied: batch, the part left
out. Held: greedy, `--context` tokens per sequence and page 16, `--layers` of the shape's layers with random weights,
JAX's default of CUDA graphs, steps dispatched ahead of the device. Expected on an H200: GEMMs and attention at the rate
of memory.

    python -m experiments.step_parts [--shape llama3-8b] [--batch 8 64 256] [--context 1024] [--layers 8]

A step without parts computes nonsense, and no branch depends on it. `host` is the time to dispatch a step: above the
step's own, it is what bounds it. `bytes` is what weights and KV need at the copy rate of that run.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax.batch import Bucket, layout
from pagedjax.bench import package_data
from pagedjax.config import platform_defaults
from pagedjax.kv_cache import bytes_per_page, make_kv_cache
from pagedjax.models.llama import Llama, Params
from pagedjax.models.load import dummy_params, open_checkpoint, read_config
from pagedjax.pallas_kernels.dispatch import Heads, PagedOps, paged_ops
from pagedjax.sampler import Features
from pagedjax.step import Step
from pagedjax.step_state import make_rows

from .common import Parser, conditions, record

PAGE_SIZE, WARM_UP, STEPS, REPEATS = 16, 10, 30, 5


def without_attention(ops: PagedOps) -> PagedOps:
    """Nor RoPE and the write of K and V: the queries come back."""

    def decode_step(qkv, kv, page_table, kv_lens, rotation, slots, **options: Any):
        return qkv[:, :, :-2].reshape(qkv.shape[0], -1, qkv.shape[3]), kv

    return ops._replace(decode_step=decode_step)


Change = Callable[[PagedOps], PagedOps]
LEFT_OUT: dict[str, tuple[Change, ...]] = {
    "nothing": (),
    "head and sampler": (),
    "rope, write, attention": (without_attention,),
}


class Trial:
    """A model's decode step at one batch size."""

    def __init__(self, model: Llama, params: Params, ops: PagedOps, batch: int, context: int):
        self.model, self.ops, self.batch, self.context = model, ops, batch, context
        self.flat = tuple(params.values())
        steps = (WARM_UP + STEPS) * REPEATS
        self.pages_per_seq = -(-(context + steps) // PAGE_SIZE)

    def state(self) -> tuple[Any, Any]:
        """Pages in random order, and rows that have `context` tokens each."""
        num_pages = self.batch * self.pages_per_seq
        rows = make_rows(self.batch, self.pages_per_seq)
        order = np.random.default_rng(0).permutation(num_pages).reshape(self.batch, -1) + 1
        table = rows.page_table.at[: self.batch].set(order)
        positions = rows.positions.at[: self.batch].set(self.context)
        return (
            make_kv_cache(self.model.config, num_pages + 1, PAGE_SIZE, self.model.dtype),
            rows._replace(page_table=table, positions=positions),
        )

    def run(self, left_out: str) -> dict[str, float]:
        """Milliseconds of a step, and of its dispatch alone: medians."""
        ops = self.ops
        for change in LEFT_OUT[left_out]:
            ops = change(ops)
        bucket = Bucket(True, self.batch, self.batch, self.batch)
        step = Step(self.model, ops, PAGE_SIZE, self.pages_per_seq * PAGE_SIZE, self.batch, Counter())
        function = step.forward(bucket) if left_out == "head and sampler" else step.decode(bucket, Features())
        ms, host_ms = step_ms(function, self.flat, *self.state(), all_decoding(bucket), REPEATS)
        return {"ms": ms, "host_ms": host_ms}

    def bytes(self, left_out: str) -> int:
        """Weights but for the embedding, and the KV that attention reads."""
        weights = sum(x.nbytes for x in self.flat)
        if not self.model.config.tie_word_embeddings:
            weights -= self.model.config.vocab_size * self.model.config.hidden_size * self.model.dtype.itemsize
        page = bytes_per_page(self.model.config, PAGE_SIZE, self.model.dtype)
        kv = 0 if "attention" in left_out else self.batch * self.context * page // PAGE_SIZE
        return weights + kv


def all_decoding(bucket: Bucket) -> jax.Array:
    """A packed batch in which every row decodes and needs no page."""
    packed = {name: np.zeros(shape, np.int32) for name, shape in layout(bucket).items()}
    packed["row"][:] = np.arange(bucket.num_seqs)
    packed["page_row"][:] = bucket.num_seqs
    return jnp.asarray(np.concatenate(list(packed.values())))


def step_ms(
    function: Callable[..., Any], flat: Any, kv: Any, rows: Any, packed: Any, repeats: int = 1
) -> tuple[float, float]:
    """Milliseconds of a step, and of its dispatch alone: medians of `repeats` times `STEPS` steps."""
    times, hosts = [], []
    for _ in range(repeats):
        for count in (WARM_UP, STEPS):
            jax.block_until_ready(rows)
            start = time.perf_counter()
            for _ in range(count):
                *_, kv, rows = function(flat, kv, rows, packed)
            host = time.perf_counter()
            jax.block_until_ready(rows)
        times.append((time.perf_counter() - start) / STEPS * 1e3)
        hosts.append((host - start) / STEPS * 1e3)
    return float(np.median(times)), float(np.median(hosts))


def main() -> None:
    parser = Parser("step_parts", __doc__, small="one small batch of a small model")
    parser.add_argument("--shape", default="llama3-8b", help="a named shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    config = read_config(open_checkpoint(str(package_data("shapes", args.shape)))[0])
    config = replace(config, num_layers=args.layers)
    if args.small:
        config = replace(config, num_layers=2, hidden_size=256, intermediate_size=512, vocab_size=1000)
        args.batch, args.context = [2], 32
    platform = jax.default_backend()
    dtype = jnp.dtype("float32" if platform == "cpu" else "bfloat16")
    model = Llama(config, fused=platform != "cpu", dtype=dtype)
    params = jax.block_until_ready(dummy_params(model, 0))
    ops = paged_ops("auto", Heads(config.head_dim, config.num_q_heads // config.num_kv_heads, PAGE_SIZE, dtype))
    held = conditions() | {"impl": ops.impl, "page_size": PAGE_SIZE, "dtype": dtype.name}
    held |= {"shape": args.shape, "layers": config.num_layers, "context": args.context}
    copy = held["copy_tb_s"]
    print(f"{held['device']}, {args.shape}, {config.num_layers} layers, context {args.context}, copy {copy:.2f} TB/s")
    print(f"{'batch':>5} {'without':24} {'ms':>8} {'host':>8} {'bytes':>8} {'us a layer':>10}")
    for batch in args.batch:
        trial = Trial(model, params, ops, max(batch, platform_defaults(platform).min_decode_rows), args.context)
        whole = 0.0
        for left_out in LEFT_OUT:
            times = trial.run(left_out)
            row = {"batch": trial.batch, "without": left_out, **times, "bytes_ms": trial.bytes(left_out) / copy / 1e9}
            whole = whole or row["ms"]
            row["us_a_layer"] = (whole - row["ms"]) / config.num_layers * 1e3
            print(
                f"{batch:5} {left_out:24} {row['ms']:8.3f} {row['host_ms']:8.3f} {row['bytes_ms']:8.3f} "
                f"{row['us_a_layer']:10.2f}",
                flush=True,
            )
            record(args.results, row | held)


if __name__ == "__main__":
    main()
