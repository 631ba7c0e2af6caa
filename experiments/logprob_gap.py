"""By how much do sampler and trainer disagree on the log-probability of a sampled token?

Question: of the tokens of random crowds, sampled at temperature 1, |difference| (mean, most, share that differs at
all), mean ratio of probabilities, and KL(first || second) as k3 estimates it
(http://joschu.net/blog/kl-approx.html), of
  decode/dense     the engine's rollout beside `token_logprobs`, dense causal attention, what a trainer computes;
  prefill/dense    the engine's `prompt_logprobs` of the same tokens beside the same;
  decode/prefill   the rollout beside these, so one engine beside itself;
  crowd/half       the rollout of a crowd beside that of its first half alone, up to where tokens part.
Varied: dtype, of weights, activations and KV cache; batch invariance; the crowd. Held: weights and code of the model,
shared by trainer and engine; lengths. Expected: float32 below 1e-4 everywhere; bfloat16 in the order of what is
published of vLLM beside FSDP or Megatron (PUBLISHED), since both round at every step, but with KL below 1e-3; with
batch invariance decode/prefill and crowd/half are 0 to the last bit, while decode/dense stays, for the trainer batches
otherwise.

    python -m experiments.logprob_gap [--shape llama3.2-1b] [--dtype float32 bfloat16] [--invariant 0 1] [--small]

Random weights, or the demo model's own with `--shape demo`. On a CPU a named shape is run as a small one like it.
Random weights make all next tokens about as likely; a trained model's gap is another. Rows go to
`results/logprob_gap.jsonl`, one a crowd and comparison. `--dtype` and `--invariant` run a part.
"""

import argparse
import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from pagedjax import LLM, SamplingParams
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.demo import demo_model_path
from pagedjax.models.llama import Llama, Params
from pagedjax.models.load import dummy_params, load_params, open_checkpoint, read_config
from pagedjax.models.training import token_logprobs
from pagedjax.rollout import RolloutBatch

from .common import Parser, conditions, engine_config, record, shape_path
from .quality import precision

Row = dict[str, Any]
DEMO = "demo"
SIZES = ("requests", "prompt", "output", "repeat")
DEFAULTS = {"gpu": (32, 128, 256, 5), "cpu": (16, 24, 40, 5), "small": (4, 12, 10, 1)}


class Published(NamedTuple):
    """|log-probability of the sampler - of the trainer| as others state it; None for what they do not state."""

    system: str
    mean: float | None
    most: float | None
    url: str


# Besides, with vLLM's own kernels in the trainer and batch-invariant, a KL that "always equals to 0.0", Qwen3 1.7B
# (https://blog.vllm.ai/2025/11/10/bitwise-consistent-train-inference.html).
PUBLISHED = (
    Published("vLLM, Megatron: Qwen3-8B", 0.00814, 0.235, "https://github.com/RL-Align/RL-Kernel/issues/329"),
    Published("vLLM, Megatron: Qwen3-4B", 0.011, None, "https://github.com/vllm-project/vime/issues/64"),
    Published("vLLM, transformers: Qwen2.5-0.5B", None, 0.477, "https://github.com/huggingface/trl/issues/6789"),
    Published("vLLM, FSDP: Qwen3-Omni, 4 layers", 0.064, None, "https://github.com/verl-project/verl-omni/issues/637"),
    Published("Levanter, both (JAX)", None, 0.16, "https://github.com/marin-community/marin/issues/1879"),
)


def gap(
    sampler: Float[np.ndarray, "N L"], trainer: Float[np.ndarray, "N L"], mask: Bool[np.ndarray, "N L"]
) -> dict[str, float]:
    """Of the tokens in the mask, in float64."""
    difference = trainer[mask].astype(np.float64) - sampler[mask]
    apart = np.abs(difference)
    return {
        "mean": float(apart.mean()),
        "most": float(apart.max()),
        "differing": float((apart > 0).mean()),
        "ratio": float(np.exp(difference).mean()),
        "kl": float((np.expm1(difference) - difference).mean()),
        "tokens": int(mask.sum()),
    }


def until_parted(one: RolloutBatch, other: RolloutBatch) -> Bool[np.ndarray, "N L"]:
    """Where tokens were sampled after the same ones before them, and are the same themselves."""
    same = np.logical_and.accumulate(one.tokens == other.tokens, axis=1)
    return same & one.completion_mask & other.completion_mask


class System:
    """A model, and an engine on the same parameters."""

    def __init__(self, shape: str, dtype: str, invariant: bool, args: argparse.Namespace):
        checkpoint, _ = open_checkpoint(shape)
        self.model = Llama(read_config(checkpoint), dtype=jnp.dtype(dtype))
        random = Path(shape).suffix == ".json"
        self.params: Params = dummy_params(self.model, 0) if random else load_params(self.model, checkpoint.tensors())
        length, page = args.prompt + args.output + 1, EngineConfig.page_size
        sizes = {"max_num_seqs": args.requests, "max_model_len": length}
        sizes |= {"num_pages": args.requests * -(-length // page) + 1}
        jax.config.update("jax_default_matmul_precision", precision(dtype))  # the engine compiles in other threads
        self.llm = LLM.from_params(self.params, self.model.config, dtype=dtype, batch_invariant=invariant, **sizes)
        self.rows = args.rows
        self._dense = jax.jit(partial(token_logprobs, self.model))

    def dense(self, batch: RolloutBatch) -> Float[np.ndarray, "N L"]:
        """A few rows at a time: logits of all take gigabytes."""
        padding = -len(batch.tokens) % self.rows
        tokens = np.pad(batch.tokens, ((0, padding), (0, 0)))
        parts = [self._dense(self.params, part) for part in np.split(tokens, len(tokens) // self.rows)]
        return np.concatenate([np.asarray(part) for part in parts])[: len(batch.tokens)]

    def prefill(self, batch: RolloutBatch) -> Float[np.ndarray, "N L"]:
        """The engine's, of all tokens as a prompt's."""
        ends = batch.prompt_lens + batch.completion_lens
        rows = [tokens[:end].tolist() for tokens, end in zip(batch.tokens, ends, strict=True)]
        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, prompt_logprobs=0)
        found = np.zeros(batch.tokens.shape, np.float32)
        for i, output in enumerate(self.llm.generate(rows, params, use_tqdm=False)):
            for at, entry in enumerate(output.prompt_logprobs or ()):
                found[i, at] = entry[rows[i][at]].logprob if entry else 0
        return found


def compare(system: System, args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """A crowd's four comparisons."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(args.prompt // 4 + 1, args.prompt, args.requests, endpoint=True)
    prompts = [rng.integers(0, system.model.config.vocab_size, length).tolist() for length in lens]
    params = SamplingParams(seed=seed << 16, max_tokens=args.output, ignore_eos=True)
    padding = {"prompt_length": args.prompt}
    crowd = system.llm.rollout(prompts, params, **padding)
    half = system.llm.rollout(prompts[: len(prompts) // 2], params, **padding)
    first = RolloutBatch(*(array[: len(half.tokens)] for array in crowd))
    dense, prefill, mask = system.dense(crowd), system.prefill(crowd), crowd.completion_mask
    yield {"pair": "decode/dense"} | gap(crowd.logprobs, dense, mask)
    yield {"pair": "prefill/dense"} | gap(prefill, dense, mask)
    yield {"pair": "decode/prefill"} | gap(crowd.logprobs, prefill, mask)
    yield {"pair": "crowd/half"} | gap(first.logprobs, half.logprobs, until_parted(first, half))


def read_arguments() -> argparse.Namespace:
    parser = Parser("logprob_gap", __doc__, small="one crowd of four")
    parser.add_argument("--shape", default="llama3.2-1b", help="a named shape, or demo")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--invariant", type=int, nargs="+", default=[0, 1], choices=[0, 1])
    parser.add_argument("--rows", type=int, default=2, help="that the trainer takes at a time")
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args()
    defaults = DEFAULTS["small" if args.small else jax.default_backend()]
    for name, value in zip(SIZES, defaults, strict=True):
        setattr(args, name, getattr(args, name) or value)
    return args


def main() -> None:
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    args = read_arguments()
    small = args.small or jax.default_backend() == "cpu"
    shape = demo_model_path() if args.shape == DEMO else shape_path(args.shape, small)
    about = {
        "shape": args.shape,
        "small": small and args.shape != DEMO,
        "weights": "own" if args.shape == DEMO else "random",
    }
    held = conditions() | about | {name: getattr(args, name) for name in (*SIZES, "rows")}
    print(f"{'dtype':>8} {'inv.':>4} {'pair':>15} seed {'mean':>9} {'most':>9} differing {'ratio - 1':>10} {'kl':>9}")
    for dtype in args.dtype:
        for invariant in map(bool, args.invariant):
            system = System(str(shape), dtype, invariant, args)
            config = engine_config(system.llm.engine)
            for seed in range(args.repeat):
                for found in compare(system, args, seed):
                    row = {"dtype": dtype, "invariant": invariant, "seed": seed} | found
                    record(args.results, row | held | {"config": config})
                    print(
                        f"{dtype:>8} {invariant:4} {row['pair']:>15} {seed:4} {row['mean']:9.2e} {row['most']:9.2e} "
                        f"{row['differing']:9.3f} {row['ratio'] - 1:10.2e} {row['kl']:9.2e}",
                        flush=True,
                    )
            del system  # its memory goes before the next one comes
            gc.collect()


if __name__ == "__main__":
    main()
