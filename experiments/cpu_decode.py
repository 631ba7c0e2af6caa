"""What does paging cost a CPU?

Question: how much slower is a decode step of the paged engine, Python loop included, than a plain jitted step of the
same model over a dense KV cache, and where is transformers on the same weights? Varied: batch (1, 8). Held: the demo
model in float32, `--context` tokens of context, greedy. Expected: within 1.25x of the plain step at batch 1 and 1.35x
at batch 8 (the pages of a sequence must be gathered, 1.5 to 3x the attention's own time), and ahead of transformers at
batch 1.

    uv run --extra demo python -m experiments.cpu_decode --torch-python PATH_TO_PYTHON_WITH_TORCH

The plain loop and the engine take turns of a few steps, so that both see the same machine; times are per step.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax.config import EngineConfig
from pagedjax.demo import demo_model_path
from pagedjax.engine import Engine
from pagedjax.models.dense import dense_attend, make_dense_kv
from pagedjax.models.llama import Llama, Params
from pagedjax.models.load import load_params, open_checkpoint, read_config
from pagedjax.sampling_params import SamplingParams

BLOCK = 5  # steps in a turn


class PlainLoop:
    """Greedy decoding of `batch` equal sequences over a dense cache: one jitted, unrolled step."""

    def __init__(self, model: Llama, params: Params, batch: int, context: int, steps: int):
        self.params, self.batch, self.position = params, batch, context
        max_len = context + steps + 1
        attend = dense_attend(model.config, batch, max_len)
        self.kv = make_dense_kv(model.config, batch, max_len, model.dtype)
        self.tokens = jnp.zeros(batch, jnp.int32)

        def step(params, kv, tokens, positions):
            hidden, kv = model.hidden(params, tokens, positions, kv, attend)
            return jnp.argmax(model.logits(params, hidden), axis=-1).astype(jnp.int32), kv

        self.jitted = jax.jit(step, donate_argnums=(1,))

    def step(self) -> None:
        positions = np.full(self.batch, self.position, np.int32)
        self.tokens, self.kv = self.jitted(self.params, self.kv, self.tokens, positions)
        np.asarray(self.tokens)
        self.position += 1


def start_engine(model: Llama, params: Params, batch: int, context: int, steps: int) -> Engine:
    """An engine that holds `batch` sequences of `context` tokens, all decoding."""
    config = EngineConfig(
        model="demo", max_num_seqs=batch, max_num_batched_tokens=256, max_model_len=context + steps + 8
    )
    engine = Engine(config, model, params)
    sampling = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    rng = np.random.default_rng(0)
    for i in range(batch):
        engine.add_request(str(i), rng.integers(0, model.config.vocab_size, context).tolist(), sampling)
    while not all(r.decoding for r in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    return engine


def measure(model: Llama, params: Params, batch: int, context: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step of each, over blocks of steps taken in turns."""
    total = steps + 2 * BLOCK
    plain = PlainLoop(model, params, batch, context, total)
    engine = start_engine(model, params, batch, context, total)
    times: dict[str, list[float]] = {"plain": [], "engine": []}
    for block in range(1 + steps // BLOCK):
        for name, step in (("plain", plain.step), ("engine", engine.step)):
            start = time.perf_counter()
            for _ in range(BLOCK):
                step()
            engine.runner.wait()  # the engine runs a step ahead: leave nothing running for the other's turn
            if block > 0:  # the first compiles
                times[name].append((time.perf_counter() - start) * 1e3 / BLOCK)
    return {name: float(np.median(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="decode speed on a CPU")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--torch-python", help="a Python with torch and transformers, to measure those too")
    args = parser.parse_args()
    path = demo_model_path()
    checkpoint, _ = open_checkpoint(str(path))
    model = Llama(read_config(checkpoint))
    params = load_params(model, checkpoint.tensors())
    for batch in (1, 8):
        row: dict[str, float | int] = {"batch": batch, "context": args.context}
        row |= measure(model, params, batch, args.context, args.steps)
        row["engine/plain"] = row["engine"] / row["plain"]
        if args.torch_python:
            command = [args.torch_python, "-m", "experiments.hf_decode", "--model", str(path), "--batch", str(batch)]
            command += ["--context", str(args.context), "--steps", str(args.steps)]
            root = Path(__file__).parent.parent
            output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
            row["transformers"] = json.loads(output.strip().split("\n")[-1])["median_ms"]
        print(json.dumps({k: round(v, 3) for k, v in row.items()}))


if __name__ == "__main__":
    main()
