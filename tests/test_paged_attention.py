"""The XLA path against the float32 reference: ragged lengths, page edges, permuted tables, poison in dead slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pagedjax.models.rope import apply_rope, rotation
from pagedjax.pallas_kernels import dispatch, paged_attention_xla, tuning
from pagedjax.pallas_kernels.dispatch import COPY_PAGES, DECODE_STEP, KV_WRITE, PAGED_DECODE, PAGED_PREFILL

# float32: different summation orders over at most 600 terms. bfloat16 and float16: outputs and weights are rounded to 8
# and 11 bits; weights below 1 and values near 1 leave a few units in the last place.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}

decode, prefill = PAGED_DECODE, PAGED_PREFILL


class Case:
    """Random pages, with poison in every slot that no sequence owns, and a permuted page table."""

    def __init__(self, kv_lens, *, heads=(4, 2), head_dim=16, page_size=4, dtype="float32", seed=0, poison=np.nan):
        rng = np.random.default_rng(seed)
        self.kv_lens = np.asarray(kv_lens, np.int32)
        pages_per_seq = max(1, -(-max(kv_lens) // page_size)) + 1
        num_pages = 1 + len(kv_lens) * pages_per_seq
        kv = rng.standard_normal((num_pages, 2, heads[1], page_size, head_dim)).astype(np.float32)
        self.page_table = np.zeros((len(kv_lens), pages_per_seq), np.int32)
        free = rng.permutation(np.arange(1, num_pages)).tolist()
        live = np.zeros((num_pages, page_size), bool)
        for row, kv_len in enumerate(kv_lens):
            for i in range(-(-kv_len // page_size)):
                page = free.pop()
                self.page_table[row, i] = page
                live[page, : min(page_size, kv_len - i * page_size)] = True
        kv[~np.broadcast_to(live[:, None, None, :], kv.shape[:4])] = poison
        self.kv = jnp.asarray(kv, dtype)
        self.heads, self.head_dim, self.dtype, self.rng = heads, head_dim, dtype, rng

    def queries(self, count):
        q = self.rng.standard_normal((count, self.heads[0], self.head_dim))
        return jnp.asarray(q, self.dtype)


def assert_close(actual, expected, dtype):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.fixture(params=["cpu", "gpu"])
def tiles(request, monkeypatch):
    """Both platforms' tiles, the GPU's cut so that loops over blocks happen at test sizes."""
    small = {"cpu": tuning.XlaTiles(8, 4, 1, 1), "gpu": tuning.XlaTiles(16, 8, 3, 2)}[request.param]
    monkeypatch.setattr(paged_attention_xla, "xla_tiles", lambda platform: small)
    jax.clear_caches()
    return small


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (9, 3), (8, 1)], ids=str)
def test_decode_equals_the_reference_for_every_group_size(heads, tiles):
    case = Case([1, 4, 5, 0, 23, 8], heads=heads)
    q = case.queries(6)
    args = (q, case.kv, case.page_table, case.kv_lens)
    assert_close(decode["xla"](*args, scale=0.25), decode["reference"](*args, scale=0.25), "float32")


@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [(1, "float32"), (3, "float32"), (8, "float32"), (64, "float32"), (16, "bfloat16"), (16, "float16")],
)
def test_decode_equals_the_reference_on_both_sides_of_page_edges(page_size, dtype):
    lens = sorted({1, page_size - 1, page_size, page_size + 1, 2 * page_size, 2 * page_size + 1, 300} - {0})
    case = Case(lens, page_size=page_size, dtype=dtype)
    args = (case.queries(len(lens)), case.kv, case.page_table, case.kv_lens)
    assert_close(decode["xla"](*args, scale=0.25), decode["reference"](*args, scale=0.25), dtype)


def test_rows_without_tokens_give_zeros(tiles):
    case = Case([0, 3, 0, 0, 7, 0])
    out = decode["xla"](case.queries(6), case.kv, case.page_table, case.kv_lens, scale=0.25)
    assert (np.asarray(out)[[0, 2, 3, 5]] == 0).all()
    assert np.isfinite(out).all() and (np.asarray(out)[[1, 4]] != 0).any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_slots_past_kv_len_never_leak(poison, tiles):
    lens = [1, 5, 17, 4]
    clean, poisoned = Case(lens, poison=0.0), Case(lens, poison=poison)
    q = clean.queries(4)
    for name in ("xla", "reference"):
        expected = decode[name](q, clean.kv, clean.page_table, clean.kv_lens, scale=0.25)
        actual = decode[name](q, poisoned.kv, poisoned.page_table, poisoned.kv_lens, scale=0.25)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_a_nan_in_a_live_slot_is_not_hidden(name):
    case = Case([6, 6])
    kv = case.kv.at[case.page_table[0, 1], 1, :, 1].set(np.nan)
    out = decode[name](case.queries(2), kv, case.page_table, case.kv_lens, scale=0.25)
    assert np.isnan(out[0]).any() and np.isfinite(out[1]).all()


@pytest.mark.parametrize("options", [{"soft_cap": 2.0}, {"sliding_window": 5}, {"sliding_window": 1, "soft_cap": 1.0}])
def test_soft_cap_and_sliding_window_equal_the_reference(options, tiles):
    case = Case([1, 4, 5, 23, 8])
    args = (case.queries(5), case.kv, case.page_table, case.kv_lens)
    expected = decode["reference"](*args, scale=0.7, **options)
    assert_close(decode["xla"](*args, scale=0.7, **options), expected, "float32")
    args = (case.queries(12), case.kv, case.page_table, case.kv_lens, np.array([0, 1, 1, 3, 10, 12], np.int32))
    expected = prefill["reference"](*args, scale=0.7, **options)
    assert_close(prefill["xla"](*args, scale=0.7, **options), expected, "float32")


PREFILLS = {  # (tokens in the pool, this step's included; this step's tokens)
    "whole prompts": ([5, 1, 12], [5, 1, 12]),
    "chunks in the middle": ([9, 30, 17], [4, 11, 1]),
    "empty sequences between": ([0, 7, 0, 20, 0], [0, 7, 0, 3, 0]),
    "one long": ([130], [130]),
    "many short": ([1, 2, 3, 1, 2, 3, 1, 2, 3], [1, 1, 2, 1, 2, 3, 1, 1, 1]),
}


@pytest.mark.parametrize("name", PREFILLS)
@pytest.mark.parametrize("first", [0, 3])
def test_prefill_equals_the_reference_for_ragged_queries(name, first, tiles):
    kv_lens, q_lens = PREFILLS[name]
    case = Case(kv_lens)
    cu_q_lens = (first + np.cumsum([0, *q_lens])).astype(np.int32)
    num_tokens = int(cu_q_lens[-1]) + 5  # and padding
    args = (case.queries(num_tokens), case.kv, case.page_table, case.kv_lens, cu_q_lens)
    out = prefill["xla"](*args, scale=0.25)
    assert_close(out, prefill["reference"](*args, scale=0.25), "float32")
    assert (np.asarray(out[:first]) == 0).all() and (np.asarray(out[-5:]) == 0).all()


def test_prefill_of_one_token_equals_decode():
    case = Case([9, 30, 17])
    q = case.queries(3)
    args = (q, case.kv, case.page_table, case.kv_lens)
    out = prefill["xla"](*args, np.arange(4, dtype=np.int32), scale=0.25)
    assert_close(out, decode["xla"](*args, scale=0.25), "float32")


def test_random_lengths_and_tables_equal_the_reference():
    rng = np.random.default_rng(1)
    for seed in range(20):  # one shape, so one compilation
        q_lens = rng.integers(0, 9, 5)
        kv_lens = np.where(q_lens > 0, q_lens + rng.integers(0, 40, 5), 0)
        kv_lens[seed % 5] = max(kv_lens[seed % 5], 1)
        case = Case([*kv_lens.tolist(), 48], seed=seed)
        cu_q_lens = np.cumsum([0, *q_lens, 8]).astype(np.int32)
        args = (case.queries(64), case.kv, case.page_table, case.kv_lens, cu_q_lens)
        assert_close(prefill["xla"](*args, scale=0.25), prefill["reference"](*args, scale=0.25), "float32")
        args = (case.queries(6), case.kv, case.page_table, case.kv_lens)
        assert_close(decode["xla"](*args, scale=0.25), decode["reference"](*args, scale=0.25), "float32")


def test_kv_write_puts_each_token_in_its_slot_and_touches_no_other():
    rng = np.random.default_rng(0)
    kv = jnp.asarray(rng.standard_normal((6, 2, 3, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((7, 3, 8)), jnp.float32) for _ in range(2))
    slots = rng.permutation(np.arange(4, 24))[:7].astype(np.int32)
    expected = KV_WRITE["reference"](kv, k, v, jnp.asarray(slots))
    np.testing.assert_array_equal(jax.jit(KV_WRITE["xla"])(kv, k, v, jnp.asarray(slots)), expected)
    for token, slot in enumerate(slots):
        np.testing.assert_array_equal(expected[slot // 4, 0, :, slot % 4], k[token])
        np.testing.assert_array_equal(expected[slot // 4, 1, :, slot % 4], v[token])
    untouched = np.setdiff1d(np.arange(24), slots)
    np.testing.assert_array_equal(
        expected[untouched // 4, :, :, untouched % 4], kv[untouched // 4, :, :, untouched % 4]
    )


def test_a_decode_step_rotates_then_writes_then_attends():
    case = Case([5, 1, 0, 23])
    rng = np.random.default_rng(0)
    hkv, (hq, d) = case.kv.shape[2], case.queries(1).shape[1:]
    qkv = jnp.asarray(rng.standard_normal((4, hkv, hq // hkv + 2, d)), case.kv.dtype)
    last = np.maximum(np.asarray(case.kv_lens) - 1, 0)
    size = case.kv.shape[3]
    slots = jnp.asarray(case.page_table)[np.arange(4), last // size] * size + last % size
    positions, frequencies = jnp.asarray(last), np.linspace(1, 0.1, d // 2, dtype=np.float32)
    q, k, v = qkv[:, :, :-2].reshape(4, hq, d), qkv[:, :, -2], qkv[:, :, -1]
    q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
    written = KV_WRITE["reference"](case.kv, k, v, slots)
    expected = decode["reference"](q, written, case.page_table, case.kv_lens, scale=0.25)
    for impl in ("reference", "xla"):
        places = case.page_table, case.kv_lens, rotation(positions, frequencies), slots
        out, kv = DECODE_STEP[impl](qkv, case.kv, *places, scale=0.25)
        np.testing.assert_allclose(kv, written, rtol=1e-6, atol=1e-6)
        assert_close(out, expected, "float32")


def test_kv_write_is_in_place_where_the_pool_is_donated():
    kv = jnp.zeros((64, 2, 3, 4, 8))
    k = jnp.ones((7, 3, 8))
    compiled = jax.jit(KV_WRITE["xla"], donate_argnums=0).lower(kv, k, k, jnp.arange(7)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == kv.nbytes and memory.temp_size_in_bytes < kv.nbytes / 4


def test_copy_pages_copies_pages_and_touches_no_other():
    kv = jnp.asarray(np.random.default_rng(0).standard_normal((8, 2, 3, 4, 8)), jnp.float32)
    sources, targets = jnp.array([1, 3, 1, 0]), jnp.array([2, 7, 5, 0])
    expected = COPY_PAGES["reference"](kv, sources, targets)
    np.testing.assert_array_equal(COPY_PAGES["xla"](kv, sources, targets), expected)
    np.testing.assert_array_equal(expected[targets], kv[sources])
    untouched = np.array([0, 1, 3, 4, 6])
    np.testing.assert_array_equal(expected[untouched], kv[untouched])


HEADS = dispatch.Heads(128, 4, 16, jnp.bfloat16)


def test_an_unknown_implementation_is_refused_by_name_and_never_replaced():
    with pytest.raises(ValueError, match=r"attention_impl='magic'; accepted: auto, mosaic, xla, reference"):
        dispatch.paged_ops("magic", HEADS)
    assert dispatch.paged_ops("reference", HEADS).kv_write is KV_WRITE["reference"]
    assert dispatch.paged_ops("auto", HEADS).impl == "xla"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a machine without a GPU does")
def test_without_a_hopper_gpu_mosaic_is_refused():
    with pytest.raises(ValueError, match=r"'mosaic' does not take this device, cpu; accepted: a GPU of compute"):
        dispatch.paged_ops("mosaic", HEADS)
