"""The engine on the Mosaic kernels, in their interpreter: the step hands them what they expect."""

from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import greedy, make_engine, run

from pagedjax import engine as engine_module
from pagedjax.models.config import LlamaConfig
from pagedjax.models.llama import Llama
from pagedjax.pallas_kernels.copy_pages import copy_pages_mosaic
from pagedjax.pallas_kernels.dispatch import PagedOps
from pagedjax.pallas_kernels.kv_write import kv_write_mosaic
from pagedjax.pallas_kernels.paged_decode import paged_decode_mosaic
from pagedjax.pallas_kernels.paged_prefill import paged_prefill_mosaic
from pagedjax.pallas_kernels.tuning import DecodeTiles, PrefillTiles

INTERPRET = plgpu.InterpretGPUParams()
INTERPRETED = PagedOps(
    "mosaic",
    partial(paged_decode_mosaic, tiles=DecodeTiles(64, 2, 2, 0), interpret=INTERPRET),
    partial(paged_prefill_mosaic, tiles=PrefillTiles(64, 2, 2, True), interpret=INTERPRET),
    partial(kv_write_mosaic, max_ctas=2, interpret=INTERPRET),
    partial(copy_pages_mosaic, interpret=INTERPRET),
)
CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # of dead slots, which are masked after
def test_tokens_on_the_kernels_equal_those_through_xla_up_to_bfloat16(monkeypatch):
    model = Llama(LlamaConfig.from_hf(CONFIG), dtype=jnp.dtype(jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), len(model.shapes))
    params = {
        name: jax.random.normal(key, shape.shape, shape.dtype) * (4 / shape.shape[0] ** 0.5)
        for key, (name, shape) in zip(keys, model.shapes.items(), strict=True)
    }
    prompts = [list(range(1, 20)), [7, 5]]
    config = {"page_size": 8, "max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64, "num_pages": 20}
    tokens, logprobs = {}, {}
    for impl in ("xla", "mosaic"):
        if impl == "mosaic":
            monkeypatch.setattr(engine_module, "paged_ops", lambda *_: INTERPRETED)
        requests = run(make_engine(model, params, dtype="bfloat16", **config), prompts, greedy(3, logprobs=0))
        tokens[impl] = [r.output_token_ids for r in requests]
        logprobs[impl] = [
            step[token].logprob for r in requests for token, step in zip(r.output_token_ids, r.logprobs, strict=True)
        ]
    assert tokens["mosaic"] == tokens["xla"]
    np.testing.assert_allclose(logprobs["mosaic"], logprobs["xla"], atol=0.05)
