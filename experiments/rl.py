"""Does reinforcement learning work whose rollouts are this engine's, on the trainer's own parameters?

Question: how many sums of two numbers of two digits a small LLaMA gets right, greedily, of 512 that it was never
trained on: after supervised training that ends early, and after policy-gradient training by GRPO
(https://arxiv.org/abs/2402.03300) with PPO's clipped ratio (https://arxiv.org/abs/1707.06347), whose reward is 1 for
the right digits and an end, else 0. Besides, in every step: mean reward, KL from the supervised model, clip fraction,
and by how much sampler and trainer differ on a token's log-probability.
Varied: the seed, of weights, split, batches and samples. Held: all else. The model is trained from nothing, in float32;
trainer and engine share arrays (`LLM.from_params`), the engine gets each step's (`update_params`), and samples with the
policy whose version its tokens carry. The supervised part ends with the first check, every few steps on the held-out
sums, that reaches `--supervised-until`; what follows is chosen by nothing. KL and entropy are those of the policy at
the temperature that samples.
Expected: from 40 % to 80 % or more with every seed; log-probabilities within 1e-4; nothing compiled after the first
step.

    python -m experiments.rl [--seeds 0 1 2] [--steps 140] [--kl-weight 0.01] [--small]

Rows go to `results/rl.jsonl`: `kind` "step" of a training step, "evaluation" of a check (`phase` supervised or rl),
which has the engine's settings. On two CPU cores three seeds take about ten minutes. `--small` runs a tiny model for
two steps, and is right if the loss is finite.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from pagedjax import LLM, SamplingParams
from pagedjax.models.config import LlamaConfig
from pagedjax.models.llama import Llama, Params
from pagedjax.models.training import token_logprobs
from pagedjax.rollout import RolloutBatch

from .common import Parser, conditions, engine_config, record
from .grpo import Experience, group_advantages, kl_estimate, make_train_step

PLUS, EQUALS, END, VOCAB = 10, 11, 12, 16  # digits stand for themselves
NUMBERS, PROMPT, ANSWER = 100, 6, 4  # 0 to 99; tokens of "37+58=", and of "95" or "103" with its end
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Hyperparameters, each a flag."""

    layers: int = 3
    hidden: int = 128
    heads: int = 4
    held_out: int = 512
    supervised_batch: int = 256
    supervised_rate: float = 1e-3
    supervised_until: float = 0.4
    supervised_steps: int = 600  # at most
    check_every: int = 10
    steps: int = 140
    evaluate_every: int = 10
    prompts: int = 64
    samples: int = 8
    epochs: int = 1
    minibatches: int = 4
    rate: float = 1.2e-4  # at first, falling to nothing
    gradient_norm: float = 1.0  # at most
    second_moment: float = 0.99
    clip: float = 0.2
    kl_weight: float = 0.0
    temperature: float = 0.7


SMALL = {"layers": 1, "hidden": 32, "heads": 2, "held_out": 16, "supervised_batch": 32, "supervised_until": 1.0}
SMALL |= {"supervised_steps": 4, "check_every": 2, "steps": 2, "evaluate_every": 1, "prompts": 4, "samples": 4}


def prompt_of(pair: int) -> list[int]:
    """The tokens of a sum: 3758 is "37+58="."""
    a, b = divmod(int(pair), NUMBERS)
    return [a // 10, a % 10, PLUS, b // 10, b % 10, EQUALS]


def answer_of(pair: int) -> list[int]:
    return [*map(int, str(sum(divmod(int(pair), NUMBERS)))), END]


def reward(pair: int, completion: Sequence[int]) -> float:
    """1 for the sum's digits and an end, else 0."""
    return float(list(completion) == answer_of(pair))


def examples(pairs: Int[np.ndarray, "N"]) -> tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N L"]]:
    """Sums with their answers, and where these stand."""
    tokens = np.full((len(pairs), PROMPT + ANSWER), END, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, pair in enumerate(pairs):
        answer = answer_of(pair)
        tokens[row, : PROMPT + len(answer)] = prompt_of(pair) + answer
        mask[row, PROMPT : PROMPT + len(answer)] = True
    return tokens, mask


def policy_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam with a rate that falls: what is left of the noise in the end decides what greedy answers are."""
    updates = settings.steps * settings.epochs * settings.minibatches
    adam = optax.adam(optax.linear_schedule(settings.rate, 0, updates), b2=settings.second_moment)
    return optax.chain(optax.clip_by_global_norm(settings.gradient_norm), adam)


class Trainer:
    """All that is compiled, once for all seeds: the model's training steps, and an engine."""

    def __init__(self, settings: Settings):
        self.settings = settings
        sizes = {"hidden_size": settings.hidden, "intermediate_size": 2 * settings.hidden, "vocab_size": VOCAB}
        sizes |= {"num_hidden_layers": settings.layers, "num_attention_heads": settings.heads, "eos_token_id": END}
        self.model = Llama(LlamaConfig.from_hf(sizes))
        self.supervised_optimizer, self.optimizer = optax.adam(settings.supervised_rate), policy_optimizer(settings)
        terms = settings.clip, settings.kl_weight, settings.temperature
        self.train = make_train_step(self.model, self.optimizer, *terms)
        self.logprobs = jax.jit(partial(token_logprobs, self.model, temperature=settings.temperature))
        self.learn = jax.jit(self._learn)
        rows = min(settings.prompts * settings.samples, 256)
        engine: dict[str, Any] = {"max_num_seqs": rows, "max_num_batched_tokens": rows, "num_pages": rows + 1}
        engine |= {"max_model_len": PROMPT + ANSWER, "fuse_projections": False, "batch_invariant": True}
        self.llm = LLM.from_params(self.model.init(0), self.model.config, **engine)
        self.llm.engine.warm_up(progress=False)

    def _learn(
        self, params: Params, state: Any, tokens: Int[Array, "N L"], mask: Bool[Array, "N L"]
    ) -> tuple[Params, Any]:
        """A supervised step."""

        def loss(params: Params) -> Float[Array, ""]:
            return -jnp.where(mask, token_logprobs(self.model, params, tokens), 0).sum() / mask.sum()

        updates, state = self.supervised_optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state  # pyright: ignore (optax's trees)

    def rollout(self, pairs: Sequence[int], **sampling: Any) -> RolloutBatch:
        params = SamplingParams(max_tokens=ANSWER, **sampling)
        return self.llm.rollout([prompt_of(pair) for pair in pairs], params, prompt_length=PROMPT, pad_token_id=END)

    def exact_match(self, params: Params, pairs: Sequence[int]) -> float:
        self.llm.update_params(params)
        batch = self.rollout(pairs, temperature=0)
        return float(np.mean([reward(*row) for row in zip(pairs, batch.completions, strict=True)]))

    def supervise(self, seed: int, rng: np.random.Generator, train: np.ndarray, held: list[int]) -> tuple[Params, Row]:
        """A model that is right as often as asked for, or as it gets."""
        params, settings, start = self.model.init(seed), self.settings, time.perf_counter()
        state, right, step = self.supervised_optimizer.init(params), 0.0, 0
        while step < settings.supervised_steps and right < settings.supervised_until:
            params, state = self.learn(params, state, *examples(rng.choice(train, settings.supervised_batch)))
            step += 1
            if step % settings.check_every == 0:
                right = self.exact_match(params, held)
        row = {"phase": "supervised", "step": 0, "exact_match": right, "supervised_steps": step}
        return params, row | {"seconds": time.perf_counter() - start}

    def step(
        self, params: Params, state: Any, reference: Params, rng: np.random.Generator, train: np.ndarray
    ) -> tuple[Params, Any, Row]:
        """Samples, judges, trains; the engine has the new parameters in the end."""
        settings, start = self.settings, time.perf_counter()
        pairs: list[int] = rng.choice(train, settings.prompts, replace=False).tolist()
        sampling = {"n": settings.samples, "temperature": settings.temperature, "seed": int(rng.integers(1 << 30))}
        batch = self.rollout(pairs, **sampling)
        rewards = np.array([*map(reward, np.repeat(pairs, settings.samples), batch.completions)], np.float32)
        sampled = time.perf_counter()
        trainer, other = (self.logprobs(p, batch.tokens) for p in (params, reference))
        mask, version = batch.completion_mask, self.llm.engine.policy_version
        assert (batch.policy_versions[mask] == version).all()
        advantages = group_advantages(rewards.reshape(-1, settings.samples)).reshape(-1)
        experience = Experience(batch.tokens, mask, batch.logprobs, other, advantages)
        rows = np.stack([rng.permutation(rewards.size) for _ in range(settings.epochs)])
        order = rows.reshape(settings.epochs * settings.minibatches, -1)
        params, state, metrics = self.train(params, state, experience, order)
        row = {name: float(value) for name, value in metrics.items()} | {
            "reward": float(rewards.mean()),
            "kl": float(np.asarray(kl_estimate(trainer, other, mask))[mask].mean()),
            "entropy": float(-batch.logprobs[mask].mean()),
            "length": float(batch.completion_lens.mean()),
            "apart_max": float(np.abs(np.asarray(trainer) - batch.logprobs)[mask].max()),
            "policy_version": version,
            "rollout_s": sampled - start,
            "train_s": time.perf_counter() - sampled,
        }
        self.llm.update_params(params)
        return params, state, row

    def run(self, seed: int) -> Iterator[Row]:
        """Rows of a seed, as they come."""
        rng, settings = np.random.default_rng(seed), self.settings
        train, held = np.split(rng.permutation(NUMBERS**2), [-settings.held_out])
        params, row = self.supervise(seed, rng, train, held.tolist())
        yield {"kind": "evaluation"} | row
        reference, state, start = params, self.optimizer.init(params), time.perf_counter()
        self.llm.update_params(params)
        compiled = 0
        for step in range(1, settings.steps + 1):
            params, state, row = self.step(params, state, reference, rng, train)
            compiled = compiled or self.llm.engine.num_compilations
            assert self.llm.engine.num_compilations == compiled, "the engine compiled again"
            yield {"kind": "step", "step": step} | row
            if step % settings.evaluate_every == 0:
                right, took = self.exact_match(params, held.tolist()), time.perf_counter() - start
                yield {"kind": "evaluation", "phase": "rl", "step": step, "exact_match": right, "seconds": took}


def show(row: Row) -> None:
    print(" ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def read_settings(args: argparse.Namespace) -> Settings:
    given = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    settings = replace(given, **SMALL) if args.small else given
    if settings.prompts * settings.samples % settings.minibatches:
        raise ValueError(f"minibatches={settings.minibatches}; accepted: divisors of prompts * samples")
    return settings


def main() -> None:
    parser = Parser("rl", __doc__, small="two steps of a tiny model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for field in fields(Settings):
        kind: Callable[[str], Any] = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    args = parser.parse_args()
    settings = read_settings(args)
    jax.config.update("jax_default_matmul_precision", "highest")  # else a GPU's float32 is TF32
    held, trainer = conditions() | {"settings": asdict(settings)}, Trainer(settings)
    for seed in args.seeds[:1] if args.small else args.seeds:
        for row in trainer.run(seed):
            assert np.isfinite(row.get("loss", 0.0)), row
            show({"seed": seed} | row)
            about = {} if row["kind"] == "step" else {"config": engine_config(trainer.llm.engine)}
            record(args.results, {"seed": seed} | row | held | about)


if __name__ == "__main__":
    main()
