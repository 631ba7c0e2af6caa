"""Models and oracles that several test files use."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax.config import EngineConfig
from pagedjax.engine import Engine
from pagedjax.models.dense import causal_attend, dense_attend, make_dense_kv
from pagedjax.models.llama import Llama, Params
from pagedjax.models.load import load_params, open_checkpoint, read_config
from pagedjax.request import Request
from pagedjax.sampling_params import SamplingParams

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"

# Two float32 computations of the same logits differ by summation order alone: measured below 2e-5 on the tiny models,
# whose logits are of order 10. A greedy choice whose margin is over NEAR_TIE cannot flip.
NEAR_TIE = 1e-3


@cache
def load_tiny(name: str, fused: bool = False) -> tuple[Llama, Params]:
    """One of the tiny golden models, in float32."""
    checkpoint, _ = open_checkpoint(str(TINY / name))
    model = Llama(read_config(checkpoint), fused=fused)
    return model, load_params(model, checkpoint.tensors())


def golden(name: str) -> dict[str, Any]:
    return json.loads((TINY / name / "golden.json").read_text())


def make_engine(model: Llama, params: Params, **config: Any) -> Engine:
    """An engine with small defaults."""
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 96, "page_size": 4, "num_pages": 400}
    return Engine(EngineConfig(model="test", **{**defaults, **config}), model, params)


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Request]:
    """All prompts through the engine at once; integrity is checked at every step."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    pairs = enumerate(zip(prompts, each, strict=True))
    requests = [r for i, (prompt, p) in pairs for r in engine.add_request(str(i), prompt, p)]
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    assert engine.pool.num_used == 0
    return requests


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def causal_logits(model: Llama, params: Params, tokens: list[int]) -> jax.Array:
    """Logits of every position of one sequence, [T, V], without a cache."""
    return _causal_step(model)(params, jnp.asarray(tokens, jnp.int32))


@cache
def _causal_step(model: Llama) -> Any:
    attend = causal_attend(model.config)

    def step(params, tokens):
        kv = (None,) * model.config.num_layers
        hidden, _ = model.hidden(params, tokens, jnp.arange(tokens.size), kv, attend)
        return model.logits(params, hidden)

    return jax.jit(step)


def dense_greedy(
    model: Llama, params: Params, prompt: list[int], num_tokens: int, max_len: int = 96
) -> tuple[list[int], list[float]]:
    """Greedy tokens of one sequence over a dense KV cache, and the margin of each choice."""
    step = _dense_step(model, max_len)
    kv = make_dense_kv(model.config, 1, max_len, model.dtype)
    tokens, margins = [], []
    for position in range(len(prompt) + num_tokens - 1):
        token = (prompt + tokens)[position]
        logits, kv = step(params, kv, jnp.asarray([token], jnp.int32), jnp.asarray([position], jnp.int32))
        if position >= len(prompt) - 1:
            top = np.sort(np.asarray(logits[0]))
            tokens.append(int(jnp.argmax(logits[0])))
            margins.append(float(top[-1] - top[-2]))
    return tokens, margins


@cache
def _dense_step(model: Llama, max_len: int) -> Any:
    attend = dense_attend(model.config, 1, max_len)

    def step(params, kv, tokens, positions):
        hidden, kv = model.hidden(params, tokens, positions, kv, attend)
        return model.logits(params, hidden), kv

    return jax.jit(step)


def assert_equal_up_to_near_tie(
    actual: list[int], expected: list[int], margins: list[float], near_tie: float = NEAR_TIE
) -> int:
    """Tokens agree up to the first choice whose margin is a near-tie; returns how many were compared."""
    first_tie = next((i for i, margin in enumerate(margins) if margin < near_tie), len(expected))
    assert actual[:first_tie] == expected[:first_tie]
    return first_tie
