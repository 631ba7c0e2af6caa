"""The engine on the Mosaic kernels, in their interpreter and on a GPU: the step hands them what they expect."""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import greedy, make_engine, run

from pagedjax import engine as engine_module
from pagedjax import step as step_module
from pagedjax.models.config import LlamaConfig
from pagedjax.models.llama import Llama
from pagedjax.pallas_kernels.copy_pages import copy_pages_mosaic
from pagedjax.pallas_kernels.decode_step import decode_joined_mosaic, decode_step_mosaic
from pagedjax.pallas_kernels.dispatch import LINEAR, PagedOps
from pagedjax.pallas_kernels.kv_write import kv_write_mosaic
from pagedjax.pallas_kernels.linear import add_mosaic, project_mosaic
from pagedjax.pallas_kernels.paged_decode import paged_decode_mosaic
from pagedjax.pallas_kernels.paged_prefill import paged_prefill_mosaic
from pagedjax.pallas_kernels.project_qkv import project_qkv_mosaic
from pagedjax.pallas_kernels.tuning import DecodeTiles, LinearTiles, PrefillTiles

INTERPRET = plgpu.InterpretGPUParams()
INTERPRETED = PagedOps(
    "mosaic",
    partial(paged_decode_mosaic, tiles=DecodeTiles(64, 2, 2, 0), interpret=INTERPRET),
    partial(paged_prefill_mosaic, tiles=PrefillTiles(64, 2, 2, 16), interpret=INTERPRET),
    partial(kv_write_mosaic, max_ctas=2, interpret=INTERPRET),
    partial(decode_step_mosaic, tiles=DecodeTiles(64, 2, 2, 0), interpret=INTERPRET),
    partial(copy_pages_mosaic, interpret=INTERPRET),
    LINEAR._replace(
        project_qkv=partial(project_qkv_mosaic, tiles=LinearTiles(64, 64, 2), interpret=INTERPRET),
        decode=partial(decode_joined_mosaic, tiles=DecodeTiles(64, 2, 2, 0), interpret=INTERPRET),
        project=partial(project_mosaic, tiles=LinearTiles(64, 64, 2), interpret=INTERPRET),
        add=partial(add_mosaic, tiles=LinearTiles(64, 64, 2), interpret=INTERPRET),
    ),
)
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


def generate(impl, prompts, count, fused, **config: Any):
    """Greedy tokens of a random model, and their logprobs."""
    model = Llama(LlamaConfig.from_hf(CONFIG), fused, jnp.dtype(jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), len(model.shapes))
    params = {
        name: jax.random.normal(key, shape.shape, shape.dtype) * (4 / shape.shape[0] ** 0.5)
        for key, (name, shape) in zip(keys, model.shapes.items(), strict=True)
    }
    engine = make_engine(model, params, dtype="bfloat16", page_size=8, attention_impl=impl, **config)
    requests = run(engine, prompts, greedy(count, logprobs=0))
    logprobs = [[step[t].logprob for t, step in zip(r.output_token_ids, r.logprobs, strict=True)] for r in requests]
    return [r.output_token_ids for r in requests], logprobs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # of dead slots, which are masked after
def test_tokens_on_the_kernels_equal_those_through_xla_up_to_bfloat16(monkeypatch):
    prompts = [list(range(1, 20)), [7, 5]]
    config = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64, "num_pages": 20}
    tokens, logprobs = generate("xla", prompts, 3, False, **config)
    monkeypatch.setattr(engine_module, "paged_ops", lambda *_, **_options: INTERPRETED)
    again, more = generate("mosaic", prompts, 3, False, **config)
    assert again == tokens
    np.testing.assert_allclose(more, logprobs, atol=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in")  # of rows past the last, and of dead slots
def test_tokens_on_joined_products_equal_those_through_xla_up_to_bfloat16(monkeypatch):
    """Logprobs are compared up to a sequence's first other token."""
    prompts = [[i + 1, 7 * i + 2] for i in range(8)]
    config = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 64, "num_pages": 20}
    tokens, logprobs = generate("xla", prompts, 3, True, **config)
    used = []
    joined = step_module.JoinedProducts
    monkeypatch.setattr(step_module, "JoinedProducts", lambda *args: used.append(args) or joined(*args))
    monkeypatch.setattr(engine_module, "paged_ops", lambda *_, **_options: INTERPRETED)
    again, more = generate("mosaic", prompts, 3, True, **config)
    assert used
    assert compare(tokens, logprobs, again, more, atol=0.05) > 2 * len(prompts)


def compare(tokens, logprobs, again, more, atol) -> int:
    """How many tokens come before each sequence's first other one; logprobs are close up to there, near-ties too."""
    compared = 0
    for a, b, of_a, of_b in zip(tokens, again, logprobs, more, strict=True):
        same = next((i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))
        np.testing.assert_allclose(of_a[: same + 1], of_b[: same + 1], atol=atol)
        compared += same
    return compared


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_tokens_on_a_gpus_kernels_equal_those_through_xla_until_rounding_decides(fused):
    """In a crowd that preempts; logprobs are compared up to a sequence's first other token."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 64, int(n)).tolist() for n in rng.integers(1, 300, 40)]
    config = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 400, "num_pages": 300}
    of_xla, of_kernels = (generate(impl, prompts, 40, fused, **config) for impl in ("xla", "auto"))
    compared = compare(*of_xla, *of_kernels, atol=0.1)
    print(f"{compared} of {40 * len(prompts)} tokens before the first difference")
    assert compared > 20 * len(prompts)
