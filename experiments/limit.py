"""What does a card allow? Output tokens per second of a workload if every step ran at the card's ceilings.

Question: how far is an engine from what the hardware can do, on whatever card it runs? Arithmetic over continuous
batching: a step takes the larger of its weights' bytes at the copy rate and its products' operations at the rate of a
large product, and then the same for attention (the KV read, the causal products). No host time, no gaps between
kernels, no rows waiting (1024 rows, 16384 tokens a step). The ceilings are measured on this card: a copy, and a
bfloat16 product of 8192 cubed.

    python -m experiments.limit [--shape llama3-8b ...] [--workload NAME ...] [--json]

With --ceilings TB/S TFLOP/S nothing is measured, and no GPU needed.
"""

import argparse
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pagedjax.bench import Lengths, load_workload, package_data
from pagedjax.kv_cache import bytes_per_page
from pagedjax.models.config import LlamaConfig
from pagedjax.models.llama import Llama
from pagedjax.models.load import open_checkpoint, read_config

from .kernel_trials import median_seconds

DTYPE = jnp.dtype("bfloat16")
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 1024, 16384
COPIED, CUBE = 1 << 29, 8192  # int32 words; rows


class Ceilings(NamedTuple):
    copy_tb_s: float  # read and written
    tflops: float  # bfloat16


@dataclass
class _Sequence:
    prompt: int
    output: int
    computed: int = 0
    sampled: int = 0


@dataclass
class _Step:
    """A step's work."""

    tokens: int = 0
    sampled: int = 0
    kv: int = 0  # tokens read
    pairs: float = 0.0  # of a prompt's token and a token that it attends to

    def take(self, sequence: _Sequence, count: int) -> None:
        if count > 1:
            self.pairs += count * (sequence.computed + count / 2)
        sequence.computed += count
        self.tokens += count
        self.kv += sequence.computed
        if sequence.computed >= sequence.prompt:
            sequence.sampled += 1
            self.sampled += 1


def steps(lengths: Lengths) -> Iterator[_Step]:
    """The work of each step: decoding first, then prompts, in order of arrival."""
    waiting, running = deque(_Sequence(*pair) for pair in lengths), list[_Sequence]()
    while waiting or running:
        step = _Step()
        prompts = [s for s in running if s.computed < s.prompt]
        for sequence in running:
            if sequence.computed >= sequence.prompt:
                step.take(sequence, 1)
        for sequence in prompts:
            step.take(sequence, min(sequence.prompt - sequence.computed, MAX_NUM_BATCHED_TOKENS - step.tokens))
        while waiting and len(running) < MAX_NUM_SEQS and step.tokens < MAX_NUM_BATCHED_TOKENS:
            sequence = waiting.popleft()
            running.append(sequence)
            step.take(sequence, min(sequence.prompt, MAX_NUM_BATCHED_TOKENS - step.tokens))
        running = [s for s in running if s.sampled < s.output]
        yield step


def limit(config: LlamaConfig, lengths: Lengths, ceilings: Ceilings) -> float:
    """Output tokens per second."""
    copy, flops = ceilings.copy_tb_s * 1e12, ceilings.tflops * 1e12
    head = config.vocab_size * config.hidden_size
    params = sum(x.size for x in Llama(config, dtype=DTYPE).shapes.values())
    layers = params - head * (1 if config.tie_word_embeddings else 2)
    kv_bytes = bytes_per_page(config, 1, DTYPE)
    pair_flops = 4 * config.num_q_heads * config.head_dim * config.num_layers
    seconds = 0.0
    for step in steps(lengths):
        products = 2 * (step.tokens * layers + step.sampled * head)
        seconds += max((layers + head) * DTYPE.itemsize / copy, products / flops)
        seconds += max(step.kv * kv_bytes / copy, step.pairs * pair_flops / flops)
    return sum(output for _, output in lengths) / seconds


def measure() -> Ceilings:
    """This card's."""
    x, copy = jnp.ones(COPIED, jnp.int32), jax.jit(jnp.copy)
    rate = 2 * x.nbytes / median_seconds(lambda: copy(x), jax.block_until_ready) / 1e12
    a, multiply = jax.random.normal(jax.random.key(0), (CUBE, CUBE), DTYPE), jax.jit(jnp.matmul)
    return Ceilings(rate, 2 * CUBE**3 / median_seconds(lambda: multiply(a, a), jax.block_until_ready) / 1e12)


def main() -> None:
    parser = argparse.ArgumentParser(description="what a card allows, in output tokens per second")
    parser.add_argument("--shape", nargs="+", default=["llama3-8b"], help="named shapes")
    parser.add_argument("--workload", nargs="+", default=["sharegpt-like-256"])
    parser.add_argument("--ceilings", type=float, nargs=2, metavar=("TB/S", "TFLOP/S"), help="instead of measuring")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ceilings = Ceilings(*args.ceilings) if args.ceilings else measure()
    for shape in args.shape:
        config = read_config(open_checkpoint(str(package_data("shapes", shape)))[0])
        for workload in args.workload:
            rate = limit(config, load_workload(workload).lengths, ceilings)
            row = {"shape": shape, "workload": workload, "limit": rate, **ceilings._asdict()}
            at = f"{ceilings.copy_tb_s:.2f} TB/s, {ceilings.tflops:.0f} TFLOP/s"
            print(json.dumps(row) if args.json else f"{shape:12} {workload:22} {rate:10.1f} tokens/s at {at}")


if __name__ == "__main__":
    main()
