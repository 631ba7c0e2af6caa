"""Every kernel, and the whole step on them, compiled for an H200 without one: no spills, no copy of the pool."""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from h200 import compile_for_h200, spec, specs

from pagedjax.adjustments import make_adjustments
from pagedjax.batch import Buckets, make_batch
from pagedjax.kv_cache import make_kv_cache
from pagedjax.memory import heaviest
from pagedjax.models.config import LlamaConfig
from pagedjax.models.llama import Llama
from pagedjax.pallas_kernels.cases import CASES, Case
from pagedjax.pallas_kernels.dispatch import (
    COPY_PAGES,
    DECODE_STEP,
    KV_WRITE,
    LINEAR,
    PAGED_DECODE,
    PAGED_PREFILL,
    PagedOps,
)
from pagedjax.sampler import Features, make_masks
from pagedjax.schedule import Schedule
from pagedjax.step import SAMPLE_ROWS, Step
from pagedjax.step_state import make_rows, sample_shapes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="JAX's CUDA plugin is for Linux")
PAGES_PER_SEQ, BATCH, TOKENS = 64, 64, 1024
QUICK = ("group-4",)
POOL = 1 << 30  # bytes, about
OPS = PAGED_DECODE, PAGED_PREFILL, KV_WRITE, DECODE_STEP, COPY_PAGES
MOSAIC = PagedOps("mosaic", *(op["mosaic"] for op in OPS), linear=LINEAR)
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def pool(case: Case):
    page = 2 * case.num_kv_heads * case.page_size * case.head_dim
    return spec((POOL // (2 * page), 2, case.num_kv_heads, case.page_size, case.head_dim), case.dtype)


def tables(batch=BATCH):
    return spec((batch, PAGES_PER_SEQ), jnp.int32), spec((batch,), jnp.int32)


def test_ptxas_reports_each_kernel(capfd):
    """Or the tests below would pass without it."""
    case = CASES["group-4"]
    q = spec((37, case.num_q_heads, case.head_dim), case.dtype)  # a shape that no other test has
    compiled = compile_for_h200(
        partial(PAGED_DECODE["mosaic"], **case.options), q, pool(case), *tables(37), capfd=capfd
    )
    assert compiled.reports == 1


each_case = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_batch_invariant_decode_compiles_without_spills_or_large_temporaries(name, capfd):
    case = CASES[name]
    q = spec((BATCH, case.num_q_heads, case.head_dim), case.dtype)
    op = partial(PAGED_DECODE["mosaic"], **case.options, batch_invariant=True)
    compiled = compile_for_h200(op, q, pool(case), *tables(), capfd=capfd)
    assert compiled.spilled == 0
    assert compiled.temporaries < 64 << 20
    assert compiled.mosaic_calls == 1


@each_case
def test_a_decode_step_compiles_without_spills_or_large_temporaries(name, capfd):
    """The rotation and write, and the kernel of `paged_decode`."""
    case = CASES[name]
    qkv = spec((BATCH, case.num_kv_heads, case.num_q_heads // case.num_kv_heads + 2, case.head_dim), case.dtype)
    op = jax.jit(partial(DECODE_STEP["mosaic"], **case.options), donate_argnums=1)
    kv = pool(case)
    places = spec((2, BATCH, case.head_dim // 2), jnp.float32), spec((BATCH,), jnp.int32)
    compiled = compile_for_h200(op, qkv, kv, *tables(), *places, capfd=capfd)
    assert compiled.spilled == 0
    assert compiled.temporaries < 64 << 20
    assert compiled.aliased == kv.size * 2
    assert compiled.mosaic_calls == 2


@each_case
def test_prefill_compiles_without_spills_or_large_temporaries(name, capfd):
    case = CASES[name]
    q = spec((TOKENS, case.num_q_heads, case.head_dim), case.dtype)
    op = partial(PAGED_PREFILL["mosaic"], **case.options)
    compiled = compile_for_h200(op, q, pool(case), *tables(), spec((BATCH + 1,), jnp.int32), capfd=capfd)
    assert compiled.spilled == 0
    assert compiled.temporaries < 1 << 20
    assert compiled.mosaic_calls == 1


@each_case
def test_the_pool_is_written_in_place(name, capfd):
    case = CASES[name]
    kv, token = pool(case), spec((300, case.num_kv_heads, case.head_dim), case.dtype)
    page = spec((5,), jnp.int32)
    for op, args in (
        (KV_WRITE["mosaic"], (token, token, spec((300,), jnp.int32))),
        (COPY_PAGES["mosaic"], (page, page)),
    ):
        compiled = compile_for_h200(op, kv, *args, donate=(0,), capfd=capfd)
        assert compiled.spilled == compiled.temporaries == 0
        assert compiled.aliased == kv.size * kv.dtype.itemsize
        assert compiled.mosaic_calls == 1


LAYERS, SEQS = 3, 256
CUBLAS_WORKSPACE = 32 << 20  # bytes, which XLA sets aside for a product of cuBLASLt's


def compile_step(kind: str, num_layers: int, capfd, num_seqs: int = SEQS, num_steps: int = 1):
    """A step in its largest bucket, LLaMA-3.2-1B's shape but for the layers, and the bytes of its pool; decoding comes
    with the sampler."""
    config = LlamaConfig.from_hf(SHAPE | {"num_hidden_layers": num_layers})
    model = Llama(config, fused=True, dtype=jnp.bfloat16)
    step = Step(model, MOSAIC, 16, 4096, num_seqs, Counter())
    bucket = replace(getattr(Buckets(num_seqs, 2048, 16), kind)[-1], num_steps=num_steps)
    kv = jax.eval_shape(lambda: make_kv_cache(config, 65536, 16, jnp.bfloat16))
    rows = jax.eval_shape(lambda: make_rows(num_seqs, 256))
    packed = spec((make_batch(Schedule([], []), bucket, num_seqs).size,), jnp.int32)
    function = step.decode(bucket, Features()) if kind == "decode" else step.forward(bucket)
    args = specs(tuple(model.shapes.values())), specs(kv), specs(rows), packed
    return compile_for_h200(function, *args, capfd=capfd), sum(layer.size * 2 for layer in kv.layers)


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_step_copies_no_pool_and_launches_few_kernels_a_layer(kind, capfd):
    compiled, pool_bytes = compile_step(kind, LAYERS, capfd)
    assert compiled.aliased >= pool_bytes
    assert compiled.temporaries < 1 << 30 < pool_bytes / LAYERS
    # Rotation and write, decode; write, decode, prefill.
    assert compiled.mosaic_calls == LAYERS * {"decode": 2, "mixed": 3}[kind]
    assert compiled.sorts == (kind == "mixed")  # the layers share one plan
    assert compiled.spilled == 0
    # Two norms, four products (two with their sum), activation, write, decode; mixed: Q, K and V apart, RoPE, prefill.
    assert compiled.launches <= LAYERS * {"decode": 9, "mixed": 14}[kind] + {"decode": 19, "mixed": 35}[kind]


@pytest.mark.parametrize(
    ("num_seqs", "joined"),
    [(16, 5), *(pytest.param(rows, kernels, marks=pytest.mark.slow) for rows, kernels in ((64, 5), (96, 2))), (128, 3)],
)
def test_a_decode_step_of_few_rows_launches_few_kernels_a_layer(num_seqs, joined, capfd):
    compiled, _ = compile_step("decode", LAYERS, capfd, num_seqs)
    # Four products with all that stands between them, and attention; of more rows two products are XLA's, and all of
    # what is more than 64 rows and not a multiple.
    assert compiled.mosaic_calls == LAYERS * joined
    assert compiled.spilled == 0
    assert compiled.launches <= {5: 5, 3: 7, 2: 10}[joined] * LAYERS + 21


@pytest.mark.slow
@pytest.mark.parametrize(("num_seqs", "kernels"), [(16, 5), pytest.param(256, 2, marks=pytest.mark.slow)])
def test_several_decode_steps_copy_no_pool(num_seqs, kernels, capfd):
    compiled, pool_bytes = compile_step("decode", LAYERS, capfd, num_seqs, num_steps=4)
    assert compiled.aliased >= pool_bytes
    assert compiled.temporaries < 512 << 20 < pool_bytes / LAYERS
    assert compiled.mosaic_calls == LAYERS * kernels  # in a loop


@pytest.mark.slow
def test_the_sampler_works_on_some_rows_at_a_time(capfd):
    """All its features together: the logits of all rows, and few arrays as large as those of SAMPLE_ROWS."""
    num_seqs, vocab_size = 4 * SAMPLE_ROWS, 32768
    config = LlamaConfig.from_hf(SHAPE | {"num_hidden_layers": 1, "vocab_size": vocab_size})
    model = Llama(config, fused=True, dtype=jnp.bfloat16)
    step = Step(model, MOSAIC, 16, 4096, num_seqs, Counter())
    hidden, sequences = specs(sample_shapes(model, num_seqs))
    rows = specs(jax.eval_shape(lambda: make_rows(num_seqs, 256)))
    adjustments = specs(jax.eval_shape(lambda: make_adjustments(num_seqs + 1, vocab_size)))
    masks = specs(jax.eval_shape(lambda: make_masks(num_seqs, vocab_size)))
    args = specs(tuple(model.shapes.values())), hidden, sequences, rows, adjustments, masks
    compiled = compile_for_h200(step.sample(num_seqs, heaviest(vocab_size)), *args, capfd=capfd)
    assert compiled.temporaries < (num_seqs + 5 * SAMPLE_ROWS) * vocab_size * 4 + CUBLAS_WORKSPACE
    assert compiled.aliased > sum(x.size * x.dtype.itemsize for x in adjustments)


@pytest.mark.slow
def test_a_batch_invariant_step_is_one_that_decodes_whatever_it_has(capfd):
    config = LlamaConfig.from_hf(SHAPE | {"num_hidden_layers": LAYERS})
    model = Llama(config, fused=True, dtype=jnp.bfloat16)
    invariant = MOSAIC._replace(decode_step=partial(MOSAIC.decode_step, batch_invariant=True))
    step = Step(model, invariant, 16, 4096, SEQS, Counter(), by_token=True)
    (bucket,) = Buckets(SEQS, SEQS, 16).largest().mixed
    kv = jax.eval_shape(lambda: make_kv_cache(config, 65536, 16, jnp.bfloat16))
    rows = jax.eval_shape(lambda: make_rows(SEQS, 256))
    packed = spec((make_batch(Schedule([], []), bucket, SEQS).size,), jnp.int32)
    args = specs(tuple(model.shapes.values())), specs(kv), specs(rows), packed
    compiled = compile_for_h200(step.forward(bucket), *args, capfd=capfd)
    assert compiled.spilled == 0 and compiled.temporaries < 1 << 28
    assert compiled.mosaic_calls <= 3 * LAYERS  # rotation and write, attention in splits, their sum
