"""Attention over pages: names of implementations to functions. The only module others import.

All implementations of an op have one signature and one meaning, that of its `reference`:

paged_decode(q [B, Hq, D], kv [P, 2, Hkv, page_size, D], page_table i32[B, pages_per_seq], kv_lens i32[B], *, scale,
soft_cap=None, sliding_window=None) -> [B, Hq, D]: one new token per sequence attends to the first kv_lens[b] slots of
its pages, itself among them. A row with kv_lens 0 gives zeros.

paged_prefill(q [T, Hq, D], kv, page_table, kv_lens, cu_q_lens i32[B + 1], *, scale, soft_cap=None, sliding_window=None)
-> [T, Hq, D]: tokens [cu_q_lens[b], cu_q_lens[b + 1]) are the last ones of the kv_lens[b] tokens of sequence b, and
attend causally. Tokens of no sequence give zeros.

kv_write(kv, k [T, Hkv, D], v [T, Hkv, D], slots i32[T]) -> kv: puts each token in slot `page * page_size + offset`.

decode_step(qkv [B, Hkv, G + 2, D], kv, page_table, kv_lens, rotation f32[2, B, D/2], slots, *, scale, soft_cap=None,
sliding_window=None) -> ([B, Hq, D], kv): of the G queries of each KV head, and K and V behind them, queries and keys
are rotated by angles of these cosines and sines, K and V written to `slots`, then paged_decode.

copy_pages(kv, sources i32[C], targets i32[C]) -> kv: page sources[i] to page targets[i]. No page is a target twice, nor
both source and target; but the null page may be copied to itself, any number of times.

A page beyond a sequence's length is never read into a result; page 0, the null page, pads tables.

Arguments that do not fit raise ValueError, naming the argument, its value and what is accepted, before any launch.
`mosaic` needs a Hopper GPU (compute capability 9.0), head sizes and pages of `validate.py`; `xla` runs everywhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from .copy_pages import copy_pages_mosaic
from .decode_step import decode_joined_mosaic, decode_step_mosaic, decode_step_reference, decode_step_xla
from .kv_write import kv_write_mosaic
from .linear import (
    ALL_ROWS,
    Stream,
    add_mosaic,
    add_xla,
    end_stream,
    project_mosaic,
    project_xla,
    start_stream,
    takes,
)
from .linear import joins_rows as joins_rows
from .paged_attention_reference import (
    copy_pages_reference,
    kv_write_reference,
    paged_decode_reference,
    paged_prefill_reference,
)
from .paged_attention_xla import copy_pages_xla, kv_write_xla, paged_decode_xla, paged_prefill_xla
from .paged_decode import paged_decode_mosaic
from .paged_prefill import paged_prefill_mosaic
from .project_qkv import project_qkv_mosaic
from .tuning import wide
from .validate import (
    check_add,
    check_attention,
    check_copy,
    check_packed,
    check_project,
    check_project_qkv,
    check_step,
    check_write,
    unsupported,
)

Op = Callable[..., jax.Array]
OPTIONS = ("scale", "soft_cap", "sliding_window")  # static


def _decode(impl: str, op: Op) -> Op:
    """A decode op that checks its arguments, in its own jit: a model's layers trace and lower it once."""
    jitted = jax.jit(op, static_argnames=OPTIONS + (("batch_invariant",) if impl == "mosaic" else ()))

    def paged_decode(q, kv, page_table, kv_lens, *, batch_invariant: bool = False, **options: Any):
        check_attention(impl, options, q, kv, page_table, kv_lens)
        if impl == "mosaic":  # the others sum every row in an order of its own
            options["batch_invariant"] = batch_invariant
        return jitted(q, kv, page_table, kv_lens, **options)

    return paged_decode


def _decode_step(impl: str, op: Callable[..., Any]) -> Callable[..., Any]:
    jitted = jax.jit(op, static_argnames=OPTIONS + (("batch_invariant",) if impl == "mosaic" else ()))

    def decode_step(qkv, kv, page_table, kv_lens, rotation, slots, *, batch_invariant: bool = False, **options: Any):
        check_step(impl, options, qkv, kv, page_table, kv_lens, rotation, slots)
        if impl == "mosaic":
            options["batch_invariant"] = batch_invariant
        return jitted(qkv, kv, page_table, kv_lens, rotation, slots, **options)

    return decode_step


def _prefill(impl: str, op: Op) -> Op:
    jitted = jax.jit(op, static_argnames=OPTIONS)

    def paged_prefill(q, kv, page_table, kv_lens, cu_q_lens, **options: Any):
        check_attention(impl, options, q, kv, page_table, kv_lens, cu_q_lens)
        return jitted(q, kv, page_table, kv_lens, cu_q_lens, **options)

    return paged_prefill


def _update(check: Callable[..., None], op: Op) -> Op:
    jitted = jax.jit(op)

    def update(kv, *args):
        check(kv, *args)
        return jitted(kv, *args)

    return update


PAGED_DECODE = {
    "mosaic": _decode("mosaic", paged_decode_mosaic),
    "xla": _decode("xla", paged_decode_xla),
    "reference": _decode("reference", paged_decode_reference),
}
PAGED_PREFILL = {
    "mosaic": _prefill("mosaic", paged_prefill_mosaic),
    "xla": _prefill("xla", paged_prefill_xla),
    "reference": _prefill("reference", paged_prefill_reference),
}
KV_WRITE = {
    "mosaic": _update(check_write, kv_write_mosaic),
    "xla": _update(check_write, kv_write_xla),
    "reference": _update(check_write, kv_write_reference),
}
DECODE_STEP = {
    "mosaic": _decode_step("mosaic", decode_step_mosaic),
    "xla": _decode_step("xla", decode_step_xla),
    "reference": _decode_step("reference", decode_step_reference),
}
COPY_PAGES = {
    "mosaic": _update(check_copy, copy_pages_mosaic),
    "xla": _update(check_copy, copy_pages_xla),
    "reference": _update(check_copy, copy_pages_reference),
}


class LinearOps(NamedTuple):
    """Products of few rows: `linear.py`, `project_qkv.py`.

    project_qkv(stream, weight [H, Hkv, G + 2, D], kv, rotation f32[2, M, D/2], slots i32[M], *, eps) -> (qkv [M, Hkv,
    G + 2, D], kv): norm(x) @ weight, queries and keys rotated by angles of these cosines and sines, K and V written.

    decode(qkv, kv, page_table, kv_lens, *, scale, soft_cap=None, sliding_window=None) -> [M, Hq, D]: paged_decode of
    its queries.
    """

    start: Callable[..., Stream]
    project_qkv: Callable[..., Any]
    decode: Op
    project: Op
    add: Callable[..., Stream]
    end: Op
    takes: Callable[..., bool]


_PROJECT, _ADD = jax.jit(project_mosaic, static_argnames=("eps",)), jax.jit(add_mosaic)
_PROJECT_QKV = jax.jit(project_qkv_mosaic, static_argnames=("eps",))
_DECODE = jax.jit(decode_joined_mosaic, static_argnames=(*OPTIONS, "batch_invariant"))


def _project_qkv(stream: Stream, weight: jax.Array, kv, rotation, slots, *, eps: float) -> tuple[jax.Array, jax.Array]:
    check_project_qkv(stream, weight, kv, rotation, slots)
    return _PROJECT_QKV(stream, weight, kv, rotation, slots, eps=eps)


def _decode_joined(qkv, kv, page_table, kv_lens, *, batch_invariant: bool = False, **options: Any) -> jax.Array:
    check_packed("mosaic", options, qkv, kv, page_table, kv_lens)
    return _DECODE(qkv, kv, page_table, kv_lens, batch_invariant=batch_invariant, **options)


def _project(stream: Stream, weight: jax.Array, *, eps: float) -> jax.Array:
    check_project(stream, weight)
    few = stream.x.shape[0] <= ALL_ROWS or not wide(weight.shape[2])
    return (_PROJECT if few else project_xla)(stream, weight, eps=eps)


def _add(stream: Stream, y: jax.Array, weight: jax.Array, norm_weight: jax.Array) -> Stream:
    check_add(stream, y, weight, norm_weight)
    return (_ADD if y.shape[0] <= ALL_ROWS else add_xla)(stream, y, weight, norm_weight)


LINEAR = LinearOps(start_stream, _project_qkv, _decode_joined, _project, _add, end_stream, takes)


class PagedOps(NamedTuple):
    """One implementation of the ops; without `linear` products are XLA's."""

    impl: str
    decode: Op
    prefill: Op
    kv_write: Op
    decode_step: Callable[..., Any]
    copy_pages: Op
    linear: LinearOps | None = None


class Heads(NamedTuple):
    """What decides whether the Mosaic kernels take a model."""

    head_dim: int
    group: int  # query heads per KV head
    page_size: int
    dtype: Any


def paged_ops(impl: str, heads: Heads, *, batch_invariant: bool = False) -> PagedOps:
    """The ops of an implementation. A name has no fallback; `auto` is `mosaic` where that takes the device and the
    heads, else `xla`.

    `batch_invariant`: a sequence's decode result does not depend on the sequences beside it.
    """
    if impl != "auto" and impl not in PAGED_DECODE:
        raise ValueError(f"attention_impl={impl!r}; accepted: auto, {', '.join(PAGED_DECODE)}")
    problem = unsupported(*heads)
    if not _on_hopper():
        problem = f"this device, {jax.devices()[0].device_kind}; accepted: a GPU of compute capability 9.0"
    if impl == "mosaic" and problem:
        raise ValueError(f"attention_impl='mosaic' does not take {problem}; attention_impl='xla' takes any")
    name = ("xla" if problem else "mosaic") if impl == "auto" else impl
    decode, decode_step = (partial(op[name], batch_invariant=batch_invariant) for op in (PAGED_DECODE, DECODE_STEP))
    linear = None
    if name == "mosaic":
        linear = LINEAR._replace(decode=partial(LINEAR.decode, batch_invariant=batch_invariant))
    return PagedOps(name, decode, PAGED_PREFILL[name], KV_WRITE[name], decode_step, COPY_PAGES[name], linear)


def _on_hopper() -> bool:
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
