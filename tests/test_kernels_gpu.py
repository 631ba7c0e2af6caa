"""The Mosaic kernels on a GPU against the float32 reference, on fresh random lengths, tables and values."""

import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_helpers import (
    MAX_ERROR,
    Pages,
    assert_same_pool,
    grow_keys,
    pairs_of_products,
    qkv_projection,
    relative_error,
)

from pagedjax.pallas_kernels.cases import CASES, Case
from pagedjax.pallas_kernels.dispatch import COPY_PAGES, DECODE_STEP, KV_WRITE, LINEAR, PAGED_DECODE, PAGED_PREFILL

pytestmark = pytest.mark.gpu

DRAWS = 20  # of each case
BATCH, LONGEST, TOKENS = 12, 1000, 256
each_case = pytest.mark.parametrize("name", CASES)


def draw_lens(rng, case):
    """Lengths of a batch: page and block edges, empty rows, one long."""
    size = case.page_size
    edges = [0, 0, 1, size - 1, size, size + 1, 127, 128, 129, 2 * size, LONGEST]
    lens = [int(rng.choice(edges)) if rng.random() < 0.5 else int(rng.integers(1, 500)) for _ in range(BATCH)]
    lens[int(rng.integers(BATCH))] = LONGEST
    return np.minimum(lens, LONGEST)


def draw_pages(rng, case, lens):
    """Pages of these lengths, some of them shared, with a poison that changes from draw to draw."""
    most = -(-LONGEST // case.page_size) + 2
    poison = rng.choice([np.nan, np.inf, -np.inf])
    pages = Pages(
        lens, case, pages_per_seq=most, num_pages=BATCH * most + 2, seed=int(rng.integers(2**31)), poison=poison
    )
    a, b = rng.integers(BATCH, size=2)
    if lens[b] <= lens[a]:  # b's tokens become the first ones of a
        pages.page_table = pages.page_table.at[b].set(pages.page_table[a])
    return pages


def run(op, args, options, expected, dtype):
    """An op over memory full of NaN, twice: right, complete, and the same bit for bit."""
    jax.block_until_ready([jnp.full(args[0].shape, jnp.nan, args[0].dtype) for _ in range(4)])  # freed, and taken again
    out = np.asarray(op(*args, **options), np.float32)
    assert np.isfinite(out).all()
    error = relative_error(out, expected)
    assert error < MAX_ERROR[dtype], error
    assert_equal(out, op(*args, **options))
    return error


def assert_equal(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual, np.float32), np.asarray(expected, np.float32))


@each_case
def test_decode_equals_the_reference_on_random_draws(name):
    case, seed = CASES[name], secrets.randbits(31)
    rng, errors = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        lens = draw_lens(rng, case)
        pages = draw_pages(rng, case, lens)
        args = pages.args(BATCH)
        expected = PAGED_DECODE["reference"](*args, **case.options)
        for batch_invariant in (False, True):
            options = case.options | {"batch_invariant": batch_invariant}
            errors.append(run(PAGED_DECODE["mosaic"], args, options, expected, case.dtype))
    print(f"decode {name}: seed {seed}, largest relative error of {len(errors)}: {max(errors):.1e}")


@each_case
def test_a_decode_step_equals_the_reference_on_random_draws(name):
    case, seed = CASES[name], secrets.randbits(31)
    rng, errors = np.random.default_rng(seed), []
    most = -(-LONGEST // case.page_size) + 2
    for _ in range(DRAWS // 2):
        pages = Pages(
            draw_lens(rng, case), case, pages_per_seq=most, num_pages=BATCH * most + 2, seed=int(rng.integers(2**31))
        )
        qkv, *places = pages.new_tokens()
        args = qkv, pages.kv, pages.page_table, pages.kv_lens, *places
        expected, written = DECODE_STEP["reference"](*args, **case.options)
        for batch_invariant in (False, True):
            out, kv = DECODE_STEP["mosaic"](*args, **case.options, batch_invariant=batch_invariant)
            assert_same_pool(kv[1:], written[1:], case.dtype)  # rows of no sequence write to the null page
            assert np.isfinite(np.asarray(out, np.float32)).all()
            errors.append(relative_error(out, expected))
            assert errors[-1] < MAX_ERROR[case.dtype]
    print(f"decode step {name}: seed {seed}, largest relative error of {len(errors)}: {max(errors):.1e}")


@each_case
def test_prefill_equals_the_reference_on_random_draws(name):
    case, seed = CASES[name], secrets.randbits(31)
    rng, errors = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        lens = draw_lens(rng, case)
        room, q_lens = TOKENS - 7, []
        for n in lens:
            q_lens.append(int(min(n, room, rng.choice([1, 3, 8, 64, 130]))))
            room -= q_lens[-1]
        lens = np.where(np.array(q_lens) > 0, lens, 0)
        first = int(rng.integers(0, room + 1))
        cu_q_lens = jnp.asarray(first + np.cumsum([0, *q_lens]), jnp.int32)
        args = draw_pages(rng, case, lens).args(TOKENS, cu_q_lens)
        expected = PAGED_PREFILL["reference"](*args, **case.options)
        errors.append(run(PAGED_PREFILL["mosaic"], args, case.options, expected, case.dtype))
    print(f"prefill {name}: seed {seed}, largest relative error of {len(errors)}: {max(errors):.1e}")


@each_case
def test_writes_and_copies_equal_the_reference(name):
    case, rng = CASES[name], np.random.default_rng()
    pages = 600 // case.page_size + 3
    shape = (pages, 2, case.num_kv_heads, case.page_size, case.head_dim)
    kv = jnp.asarray(rng.standard_normal(shape), case.dtype)
    for count in (1, 5, 300, 600):
        k, v = (jnp.asarray(rng.standard_normal((count, *shape[2::2])), case.dtype) for _ in range(2))
        slots = jnp.asarray(rng.permutation(np.arange(case.page_size, pages * case.page_size))[:count], jnp.int32)
        expected = KV_WRITE["reference"](kv, k, v, slots)
        assert_equal(KV_WRITE["mosaic"](kv, k, v, slots), expected)
    sources, targets = jnp.array([1, 0]), jnp.array([2, 0])
    expected = COPY_PAGES["reference"](kv, sources, targets)
    assert_equal(COPY_PAGES["mosaic"](kv, sources, targets), expected)


@pytest.mark.parametrize("impl", ["mosaic", "xla"])
def test_a_pool_of_more_than_2_to_the_31_elements_is_written_and_read(impl):
    case = Case()
    num_pages = 70_000  # 2.3e9 elements, 4.6 GB
    kv = jnp.zeros((num_pages, 2, 8, 16, 128), jnp.bfloat16)
    small = Pages([100], case)
    last = num_pages - 1 - jnp.arange(8, dtype=jnp.int32)
    page = last[jnp.arange(100) // 16]
    tokens = small.kv[small.page_table[0, jnp.arange(100) // 16], :, :, jnp.arange(100) % 16]  # [100, 2, Hkv, D]
    write = jax.jit(KV_WRITE[impl], donate_argnums=0)
    kv = write(kv, tokens[:, 0], tokens[:, 1], page * 16 + jnp.arange(100, dtype=jnp.int32) % 16)
    q = small.queries(1)
    out = PAGED_DECODE[impl](q, kv, last[None], small.kv_lens, **case.options)
    expected = PAGED_DECODE["reference"](q, small.kv, small.page_table, small.kv_lens, **case.options)
    assert relative_error(out, expected) < MAX_ERROR[case.dtype]
    kv = jax.jit(COPY_PAGES[impl], donate_argnums=0)(kv, last[:1], jnp.array([66_000]))
    moved = last.at[0].set(66_000)
    again = PAGED_DECODE[impl](q, kv, moved[None], small.kv_lens, **case.options)
    assert_equal(again, out)


def test_a_very_long_sequence_among_short_ones_equals_the_reference():
    case = Case()
    pages = Pages([131_072, 1, 0, 200], case)
    args = pages.args(4)
    expected = PAGED_DECODE["reference"](*args, **case.options)
    for batch_invariant in (False, True):
        run(PAGED_DECODE["mosaic"], args, case.options | {"batch_invariant": batch_invariant}, expected, case.dtype)


@pytest.mark.parametrize("name", ["group-4", "group-3", "float16"])
def test_scores_that_grow_from_block_to_block_give_the_references_results(name):
    case = CASES[name]
    pages = grow_keys(Pages([600, 300], case))
    args = pages.args(300, jnp.array([0, 200, 300], jnp.int32))
    expected = PAGED_PREFILL["reference"](*args, **case.options)
    run(PAGED_PREFILL["mosaic"], args, case.options, expected, case.dtype)
    args = pages.args(2)
    expected = PAGED_DECODE["reference"](*args, **case.options)
    run(PAGED_DECODE["mosaic"], args, case.options, expected, case.dtype)


def test_batch_invariant_decode_is_bit_identical_in_any_crowd():
    case, rng = Case(), np.random.default_rng()
    lens = draw_lens(rng, case)
    lens[0] = 777
    pages = draw_pages(rng, case, lens)
    q = pages.queries(BATCH)
    options = case.options | {"batch_invariant": True}
    first = PAGED_DECODE["mosaic"](q, pages.kv, pages.page_table, pages.kv_lens, **options)[0]
    for _ in range(100):
        others = rng.permutation(np.arange(1, BATCH))
        kv_lens = jnp.where(jnp.asarray(rng.random(BATCH) < 0.3), 0, pages.kv_lens).at[0].set(777)
        order = np.concatenate([others[:5], [0], others[5:]])
        out = PAGED_DECODE["mosaic"](q[order], pages.kv, pages.page_table[order], kv_lens[order], **options)
        assert_equal(out[5], first)


@pytest.mark.parametrize("rows", [8, 16, 32, 64, 128])
@pytest.mark.parametrize(
    "widths",
    [
        (2048, 2048, 3072, 1),
        (8192, 2048, 8192, 2),
        (14336, 4096, 14336, 2),
        (576, 576, 960, 1),
        (11008, 4096, 11008, 2),
    ],
    ids=["1b-attention", "1b-mlp", "8b-mlp", "135m-attention", "7b-mlp"],
)
def test_joined_products_equal_the_reference(rows, widths):
    seed = secrets.randbits(31)
    errors = {}
    for draw in range(3):
        arguments = jax.random.key(seed + draw), (rows, *widths), LINEAR.add, LINEAR.project
        (out, expected), (again, _) = pairs_of_products(*arguments), pairs_of_products(*arguments)
        for name, value in out.items():
            errors[name] = max(errors.get(name, 0), relative_error(value, expected[name]))
            assert errors[name] < MAX_ERROR["bfloat16"], (seed, name, errors)
            assert_equal(value, again[name])
    print(f"products {rows} x {widths}: seed {seed}, errors { ({n: f'{e:.1e}' for n, e in errors.items()}) }")


@pytest.mark.parametrize("rows", [8, 16, 64, 128])
@pytest.mark.parametrize(
    "sizes", [(2048, 8, 4, 64), (4096, 8, 4, 128), (4096, 32, 1, 128), (576, 3, 3, 64)], ids=["1b", "8b", "7b", "135m"]
)
def test_a_joined_qkv_projection_equals_the_reference(rows, sizes):
    seed = secrets.randbits(31)
    for draw in range(3):
        arguments = jax.random.key(seed + draw), (rows, *sizes), LINEAR.project_qkv
        (out, expected), (again, _) = qkv_projection(*arguments), qkv_projection(*arguments)
        errors = {name: relative_error(value, expected[name]) for name, value in out.items()}
        assert max(errors.values()) < MAX_ERROR["bfloat16"], (seed, errors)
        for name, value in out.items():
            assert_equal(value, again[name])
    print(f"QKV {rows} x {sizes}: seed {seed}, errors { ({n: f'{e:.1e}' for n, e in errors.items()}) }")
