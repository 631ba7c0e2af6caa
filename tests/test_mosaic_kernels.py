"""The Mosaic kernels in Pallas' interpreter, which knows shared memory, barriers and races but no GPU."""

from functools import partial

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from paged_helpers import (
    MAX_ERROR,
    Pages,
    assert_same_pool,
    grow_keys,
    relative_error,
)

from pagedjax.pallas_kernels.cases import Case
from pagedjax.pallas_kernels.copy_pages import copy_pages_mosaic
from pagedjax.pallas_kernels.decode_step import decode_step_mosaic
from pagedjax.pallas_kernels.dispatch import COPY_PAGES, DECODE_STEP, KV_WRITE, PAGED_DECODE, PAGED_PREFILL
from pagedjax.pallas_kernels.kv_write import kv_write_mosaic
from pagedjax.pallas_kernels.paged_attention_reference import kv_write_reference, rotate_reference
from pagedjax.pallas_kernels.paged_decode import paged_decode_mosaic
from pagedjax.pallas_kernels.paged_prefill import paged_prefill_mosaic
from pagedjax.pallas_kernels.rotate_write import rotate_write_mosaic
from pagedjax.pallas_kernels.tuning import DecodeTiles, PrefillTiles, Shape, decode_tiles

SMALL = Case(4, 2, 64, 16)
BALANCED, INVARIANT = DecodeTiles(64, 2, 6, 0), DecodeTiles(64, 2, 6, 1)
PREFILL = PrefillTiles(64, 2, 3, 16)
INTERPRET = plgpu.InterpretGPUParams()
races = pytest.param(plgpu.InterpretGPUParams(detect_races=True), marks=pytest.mark.slow, id="races")
slow = pytest.mark.slow


def check_decode(kv_lens, case=SMALL, tiles=BALANCED, interpret=INTERPRET):
    pages = Pages(kv_lens, case)
    args = pages.args(len(kv_lens))
    out = paged_decode_mosaic(*args, **case.options, tiles=tiles, interpret=interpret)
    expected = PAGED_DECODE["reference"](*args, **case.options)
    assert relative_error(out, expected) < MAX_ERROR[case.dtype]
    assert (np.asarray(out)[np.asarray(kv_lens) == 0] == 0).all()
    return out


@pytest.mark.parametrize("interpret", [INTERPRET, races])
@pytest.mark.parametrize("tiles", [BALANCED, INVARIANT], ids=["balanced", "invariant"])
def test_decode_equals_the_reference_over_cuts_empty_rows_and_poison(tiles, interpret):
    check_decode([5, 130, 0, 64], tiles=tiles, interpret=interpret)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(SMALL._replace(num_q_heads=6), marks=slow),
        pytest.param(SMALL._replace(num_q_heads=12, num_kv_heads=1), marks=slow),
        pytest.param(SMALL._replace(head_dim=128, num_q_heads=2), marks=slow),
        pytest.param(SMALL._replace(page_size=128), marks=slow),
        pytest.param(SMALL._replace(page_size=8, dtype="float16"), marks=slow),
        SMALL._replace(sliding_window=70, soft_cap=3.0),
    ],
    ids=["group-3", "mqa-12", "head-128", "page-128", "page-8-float16", "window-cap"],
)
def test_decode_equals_the_reference_for_each_kind_of_shape(case):
    check_decode([200, 1, 64], case)


@pytest.mark.parametrize(
    "case",
    [
        SMALL,  # fewer rows a KV head than a product's 8
        SMALL._replace(num_q_heads=8, num_kv_heads=1, page_size=8),  # more, so that neither K nor V is read as a query
        pytest.param(SMALL._replace(num_q_heads=7, num_kv_heads=1), marks=slow),
        pytest.param(SMALL._replace(num_q_heads=2, num_kv_heads=2, head_dim=128, dtype="float16"), marks=slow),
    ],
    ids=["group-2", "group-8", "group-7", "group-1"],
)
def test_a_decode_step_equals_the_reference(case):
    pages = Pages([5, 130, 0, 64], case)
    qkv, *places = pages.new_tokens()
    args = qkv, pages.kv, pages.page_table, pages.kv_lens, *places
    out, kv = decode_step_mosaic(*args, **case.options, tiles=BALANCED, interpret=INTERPRET)
    expected, written = DECODE_STEP["reference"](*args, **case.options)
    assert relative_error(out, expected) < MAX_ERROR[case.dtype]
    assert_same_pool(kv, written, case.dtype)


def test_rotation_and_write_take_more_rows_than_a_program():
    case = SMALL._replace(num_q_heads=1, num_kv_heads=1)
    pages = Pages([3] * 70, case)
    qkv, rotation, slots = pages.new_tokens()
    q, kv = rotate_write_mosaic(qkv, pages.kv, rotation, slots, interpret=INTERPRET)
    k = rotate_reference(qkv[:, :, 1], rotation)
    assert_same_pool(kv, kv_write_reference(pages.kv, k, qkv[:, :, 2], slots), case.dtype)
    assert_same_pool(q[:, :, 0], rotate_reference(qkv[:, :, 0], rotation), case.dtype)


@slow
def test_batch_invariant_decode_does_not_depend_on_the_batch():
    alone = check_decode([130], tiles=INVARIANT)
    pages, more = Pages([130], SMALL), Pages([130], SMALL)
    q = jnp.concatenate([pages.queries(1), more.queries(3)])
    table = jnp.concatenate([pages.page_table] * 4)
    lens = jnp.array([130, 40, 0, 129], jnp.int32)
    crowd = paged_decode_mosaic(
        q, pages.kv, table, lens, **SMALL.options, tiles=INVARIANT._replace(num_ctas=4), interpret=INTERPRET
    )
    np.testing.assert_array_equal(crowd[0], alone[0])


PREFILLS = {  # (tokens in the pool, this step's tokens, first row)
    "whole and chunks": ([130, 20, 0, 70], [130, 3, 0, 1], 0),
    "from the middle": ([300, 20], [13, 20], 3),
}


@pytest.mark.parametrize("interpret", [INTERPRET, races])
@pytest.mark.parametrize("name", ["whole and chunks", pytest.param("from the middle", marks=slow)])
def test_prefill_equals_the_reference_for_ragged_queries(name, interpret):
    check_prefill(*PREFILLS[name], interpret=interpret)


@pytest.mark.parametrize(
    ("case", "tiles"),
    [
        (SMALL._replace(sliding_window=40, soft_cap=3.0), PREFILL),
        pytest.param(SMALL._replace(page_size=128), PREFILL, marks=slow),
        pytest.param(SMALL._replace(head_dim=128, page_size=8, dtype="float16", num_q_heads=2), PREFILL, marks=slow),
    ],
    ids=["window-cap", "page-128", "head-128-page-8-float16"],
)
def test_prefill_equals_the_reference_for_each_kind_of_shape(case, tiles):
    check_prefill([140], [90], 0, case, tiles)


@pytest.mark.parametrize("max_paired", [16, pytest.param(0, marks=slow)])
def test_prefill_equals_the_reference_with_tiles_in_pairs_and_alone(max_paired):
    check_prefill([300, 20, 130], [290, 20, 130], 0, SMALL._replace(num_q_heads=2), PrefillTiles(64, 2, 3, max_paired))


def test_prefill_equals_the_reference_when_scores_grow_from_block_to_block():
    check_prefill([300], [40], 0, prepare=grow_keys)


def check_prefill(kv_lens, q_lens, first, case=SMALL, tiles=PREFILL, interpret=INTERPRET, prepare=lambda pages: pages):
    cu_q_lens = jnp.asarray(first + np.cumsum([0, *q_lens]), jnp.int32)
    num_tokens = int(cu_q_lens[-1]) + 5
    args = prepare(Pages(kv_lens, case)).args(num_tokens, cu_q_lens)
    out = paged_prefill_mosaic(*args, **case.options, tiles=tiles, interpret=interpret)
    expected = PAGED_PREFILL["reference"](*args, **case.options)
    assert relative_error(out, expected) < MAX_ERROR[case.dtype]
    assert (np.asarray(out[:first]) == 0).all() and (np.asarray(out[-5:]) == 0).all()


@pytest.mark.parametrize("interpret", [INTERPRET, races])
def test_kv_write_and_copy_pages_equal_the_reference(interpret):
    rng = np.random.default_rng(0)
    kv = jnp.asarray(rng.standard_normal((6, 2, 3, 8, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((7, 3, 64)), jnp.bfloat16) for _ in range(2))
    slots = jnp.asarray(rng.permutation(np.arange(8, 48))[:7], jnp.int32)
    written = kv_write_mosaic(kv, k, v, slots, max_ctas=3, interpret=interpret)
    np.testing.assert_array_equal(written, KV_WRITE["reference"](kv, k, v, slots))
    sources, targets = jnp.array([1, 3, 1]), jnp.array([2, 4, 5])
    copied = copy_pages_mosaic(kv, sources, targets, interpret=interpret)
    np.testing.assert_array_equal(copied, COPY_PAGES["reference"](kv, sources, targets))
    none = jnp.zeros(0, jnp.int32)
    np.testing.assert_array_equal(kv_write_mosaic(kv, k[:0], v[:0], none, interpret=interpret), kv)
    np.testing.assert_array_equal(copy_pages_mosaic(kv, none, none, interpret=interpret), kv)


def test_splits_depend_on_the_longest_sequence_allowed_and_not_on_the_batch():
    shape = Shape(128, 4, 16)
    for tokens in (2048, 8192, 33000, 131072):
        splits = decode_tiles(shape, tokens, batch_invariant=True)
        assert splits.split_blocks * splits.block_kv * 16 >= tokens and splits.split_blocks > 0
    assert decode_tiles(shape, 131072, batch_invariant=False).split_blocks == 0


def bad(name, change):
    args = dict(zip(("q", "kv", "page_table", "kv_lens"), Pages([20], SMALL).args(1), strict=True), scale=1.0)
    return args | {name: change(args.get(name))}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q[:, :3], r"q=\(1, 3, 64\); accepted: query heads a multiple of kv's 2"),
        ("q", lambda q: q[..., :32], r"q=\(1, 4, 32\); accepted: \[tokens, query heads, 64\]"),
        ("q", lambda q: q.astype(jnp.float16), r"q=float16; accepted: kv's dtype, bfloat16"),
        ("q", lambda q: jnp.concatenate([q, q]), r"q=\(2, 4, 64\); accepted: one token for each of the 1"),
        ("kv", lambda kv: kv[:, 0], r"kv=\(4, 2, 16, 64\); accepted: \[pages, 2, KV heads, page_size, head_dim\]"),
        ("page_table", lambda t: t[0], r"page_table=\(3,\); accepted: \[1, pages\]"),
        ("kv_lens", lambda n: n.astype(jnp.uint32), r"kv_lens=uint32; accepted: int32"),
        ("kv_lens", lambda n: n[:, None], r"kv_lens=\(1, 1\); accepted: \[B\]"),
        ("scale", lambda _: 0.0, r"scale=0.0; accepted: above 0"),
        ("soft_cap", lambda _: -1.0, r"soft_cap=-1.0; accepted: None, or above 0"),
        ("sliding_window", lambda _: 0, r"sliding_window=0; accepted: None, or at least 1"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_any_launch(name, change, message):
    for impl in ("mosaic", "xla"):
        with pytest.raises(ValueError, match=message):
            PAGED_DECODE[impl](**bad(name, change))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (SMALL._replace(head_dim=80), r"head_dim=80; accepted: 64, 128; attention_impl='xla' takes any"),
        (SMALL._replace(page_size=24), r"page_size=24; accepted: 8, 16, 32, 64, 128, 256"),
        (SMALL._replace(dtype="float32"), r"dtype=float32; accepted: bfloat16, float16"),
        (SMALL._replace(num_q_heads=33, num_kv_heads=1), r"query heads per KV head=33; accepted: 1 to 32"),
    ],
)
def test_shapes_that_the_kernels_do_not_have_are_refused_with_the_way_out(case, message):
    args = Pages([20], case).args(1)
    with pytest.raises(ValueError, match=message):
        PAGED_DECODE["mosaic"](*args, **case.options)
    with pytest.raises(ValueError, match=message):
        PAGED_PREFILL["mosaic"](*args, jnp.array([0, 1]), **case.options)


def test_bad_updates_of_the_pool_are_refused():
    kv, k = jnp.zeros((4, 2, 2, 8, 64)), jnp.zeros((3, 2, 64))
    with pytest.raises(ValueError, match=r"v=\(2, 2, 64\); accepted: \(3, 2, 64\)"):
        KV_WRITE["mosaic"](kv, k, k[:2], jnp.arange(3))
    with pytest.raises(ValueError, match=r"slots=float32\(3,\); accepted: int32 \[T\]"):
        KV_WRITE["xla"](kv, k, k, jnp.arange(3.0))
    with pytest.raises(ValueError, match=r"targets=\(3,\); accepted: \(2,\)"):
        COPY_PAGES["mosaic"](kv, jnp.arange(2), jnp.arange(3))


def test_bad_arguments_of_a_decode_step_are_refused():
    pages = Pages([20], SMALL)
    qkv, rotation, slots = pages.new_tokens()
    args = pages.kv, pages.page_table, pages.kv_lens
    for impl in ("mosaic", "xla"):
        step = partial(DECODE_STEP[impl], scale=1.0)
        with pytest.raises(ValueError, match=r"qkv=\(1, 2, 2, 64\); accepted: \[tokens, 2, query heads per"):
            step(qkv[:, :, 2:], *args, rotation, slots)
        with pytest.raises(ValueError, match=r"qkv=float32; accepted: kv's dtype, bfloat16"):
            step(qkv.astype(jnp.float32), *args, rotation, slots)
        with pytest.raises(ValueError, match=r"slots=int32\(1, 1\); accepted: int32 \[T\]"):
            step(qkv, *args, rotation, slots[:, None])
        with pytest.raises(ValueError, match=r"rotation=\(1, 1, 32\); accepted: \[2, 1, 32\]: cosines"):
            step(qkv, *args, rotation[:1], slots)
        with pytest.raises(ValueError, match=r"q=\(2, 4, 64\); accepted: one token for each of the 1 kv_lens"):
            step(jnp.concatenate([qkv, qkv]), *args, rotation, slots)
