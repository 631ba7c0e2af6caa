"""What does an engine inside a training program cost: new weights, and rollouts between training steps?

Questions, one a part:
  update  seconds until an engine has a trainer's new weights, what that compiles, and bytes in use and at their peak;
  loop    rollouts per second of a whole training loop (rollout, memory released, training step, memory restored,
          weights updated), beside the same rollouts without the rest.
Varied: shape; dtype of the trainer's weights in the first part, where bfloat16 leaves the engine only projections to
fuse and float32 makes it convert them all. Held: random weights; the engine in bfloat16; a training step of plain SGD
on all completions in microbatches, layers computed again, dense attention. Expected: an update reads the tree and
writes what is not shared, so that for 8B in bfloat16 (9 of 16 GB are fused) 18 GB at 4 TB/s take 5 ms, in float32 48 GB
12; nothing compiles; the peak is the tree, one set, the pages and the largest piece. The training step dominates the
loop; the rollout inside is as fast as alone.

    python -m experiments.rollouts [--part update loop] [--shape llama3-8b llama3.2-1b] [--small]

The first part takes the first shape, the second the last. Rows go to `results/rollouts.jsonl`, one an update or an
iteration. Peaks are a process's, so run the first part by itself.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax import LLM, SamplingParams
from pagedjax.config import request_memory_fraction
from pagedjax.models.config import LlamaConfig
from pagedjax.models.llama import Llama
from pagedjax.models.load import dummy_params
from pagedjax.models.training import token_logprobs

from .common import Parser, conditions, engine_config, record, shape_path

Row = dict[str, Any]
PARTS = "update", "loop"
SIZES = ("pages", "prompts", "samples", "length", "repeat")
DEFAULTS = {"gpu": (4097, 64, 8, 128, 5), "cpu": (129, 4, 2, 16, 3), "small": (129, 2, 2, 8, 1)}
RATE = 1e-6  # of SGD
ROWS = 8  # of a microbatch


def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds until what it returns is there, and that."""
    start = time.perf_counter()
    found = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, found


def updated(llm: LLM, params: Any) -> Any:
    """The engine's weights, after an update."""
    llm.update_params(params)
    return llm.engine.runner.weights.arrays


def memory() -> dict[str, int]:
    """Bytes in use and at the process's peak so far; nothing where the platform does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use") if name in stats}


def update(config: LlamaConfig, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of updates, each from a tree of its own, so that no array is the engine's already."""
    for dtype in args.dtype:
        trainer = Llama(config, dtype=jnp.dtype(dtype))
        trees = [dummy_params(trainer, seed) for seed in range(2 if dtype == args.engine_dtype else 1)]
        settings = {"num_pages": args.pages, "max_model_len": 2048, "dtype": args.engine_dtype}
        llm = LLM.from_params(trees[0], config, fuse_projections=True, **settings)
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        llm.rollout([[1, 2, 3]], params)
        arrays = llm.engine.runner.weights.arrays
        held = {"config": engine_config(llm.engine), "tree_bytes": nbytes(trees[0]), "trees": len(trees)}
        held |= {"weights_bytes": nbytes(arrays), "largest_bytes": max(x.nbytes for x in arrays)}
        del arrays
        compiled, before = llm.engine.num_compilations, memory()
        for trial in range(args.repeat):
            seconds = timed(updated, llm, trees[(trial + 1) % len(trees)])[0]  # no name keeps the arrays
            llm.rollout([[1, 2, 3]], params)
            row = {"trainer": dtype, "trial": trial, "seconds": seconds, "before": before, "after": memory()}
            yield row | {"compilations": llm.engine.num_compilations - compiled} | held
        del llm, trees
        gc.collect()


def nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def loop(config: LlamaConfig, args: argparse.Namespace) -> Iterator[Row]:
    """Rows of iterations: the first rollouts are not followed by training."""
    model = Llama(config, dtype=jnp.dtype(args.engine_dtype))
    params = dummy_params(model, 0)
    count = args.prompts * args.samples
    sizes = {"max_model_len": 2 * args.length, "max_num_seqs": count, "dtype": args.engine_dtype}
    if args.small or jax.default_backend() == "cpu":
        sizes |= {"num_pages": args.pages}
    llm = LLM.from_params(params, config, gpu_memory_utilization=args.utilization, **sizes)
    train_step = make_train_step(model, min(ROWS, count))
    rng = np.random.default_rng(0)
    sampling = SamplingParams(n=args.samples, max_tokens=args.length, ignore_eos=True)
    for trains in (False, True):
        for trial in range(args.repeat + 1):  # the first one compiles
            prompts = rng.integers(0, config.vocab_size, (args.prompts, args.length)).tolist()
            compiled, start = llm.engine.num_compilations, time.perf_counter()
            batch = llm.rollout(prompts, sampling)
            seconds = {"rollout": time.perf_counter() - start}
            if trains:
                seconds["release"] = timed(llm.release_memory)[0]
                advantages = rng.standard_normal((count, 1)).astype(np.float32)
                seconds["train"], params = timed(train_step, params, batch, advantages)
                seconds["restore"] = timed(llm.restore_memory)[0]
                seconds["update"] = timed(updated, llm, params)[0]
            whole = time.perf_counter() - start
            row = {"trains": trains, "trial": trial, "rollouts": count, "seconds": seconds, "memory": memory()}
            row |= {"rollouts_per_s": count / seconds["rollout"], "loop_rollouts_per_s": count / whole}
            row |= {"output_tokens_per_s": count * args.length / seconds["rollout"]}
            row |= {"compilations": llm.engine.num_compilations - compiled}
            if trial:
                yield row | {"config": engine_config(llm.engine)}


def make_train_step(model: Llama, rows: int) -> Callable[[Any, Any, Any], Any]:
    """SGD on the ratio of probabilities times advantages, gradients added up over microbatches."""

    def loss(params: Any, part: Any, gains: Any) -> Any:
        ratio = jnp.exp(token_logprobs(model, params, part.tokens, remat=True) - part.logprobs)
        return -jnp.where(part.completion_mask, ratio * gains, 0).mean()

    def train_step(params: Any, batch: Any, advantages: Any) -> Any:
        def add(total: Any, part: Any) -> Any:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, *part)), None

        parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (batch, advantages))
        gradient, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return jax.tree.map(lambda p, g: p - (RATE * g).astype(p.dtype), params, gradient)

    return jax.jit(train_step)


RUN: dict[str, Callable[[LlamaConfig, argparse.Namespace], Iterator[Row]]] = {"update": update, "loop": loop}


def main() -> None:
    parser = Parser("rollouts", __doc__, small="few short rollouts, one trial")
    parser.add_argument("--shape", nargs="+", default=["llama3-8b", "llama3.2-1b"], help="named shapes")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], help="of the trainer's weights, in the first part"
    )
    parser.add_argument("--engine-dtype", default="bfloat16")
    parser.add_argument("--utilization", type=float, default=0.8, help="of a GPU's memory, while the loop samples")
    parser.add_argument("--pages", type=int, help="of the engine that is updated; on a CPU of both")
    for name in SIZES[1:]:
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    request_memory_fraction(0.95)  # the trainer needs it while the engine's pages are gone
    small = args.small or jax.default_backend() == "cpu"
    for name, value in zip(SIZES, DEFAULTS["small" if args.small else jax.default_backend()], strict=True):
        setattr(args, name, getattr(args, name) or value)
    held = conditions() | {"small": small} | {name: getattr(args, name) for name in SIZES}
    for part in args.part:
        shape = args.shape[0 if part == "update" else -1]
        config = LlamaConfig.from_hf(json.loads(Path(shape_path(shape, small)).read_text()))
        for row in RUN[part](config, args):
            record(args.results, {"part": part, "shape": shape} | row | held)
            seconds = row["seconds"] if part == "update" else sum(row["seconds"].values())
            shown = "trainer", "trains", "trial", "compilations", "rollouts_per_s"
            print(part, shape, f"{seconds:.4f} s", *(f"{k}={row[k]}" for k in shown if k in row), flush=True)


if __name__ == "__main__":
    main()
