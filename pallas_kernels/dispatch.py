"""Attention over pages: names of implementations to functions. The only module others import.

All implementations of an op have one signature and one meaning, that of its `reference`:

paged_decode(q [B, Hq, D], kv [P, 2, Hkv, page_size, D], page_table i32[B, pages_per_seq], kv_lens i32[B], *, scale,
soft_cap=None, sliding_window=None) -> [B, Hq, D]: one new token per sequence attends to the first kv_lens[b] slots of
its pages, itself among them. A row with kv_lens 0 gives zeros.

paged_prefill(q [T, Hq, D], kv, page_table, kv_lens, cu_q_lens i32[B + 1], *, scale, soft_cap=None, sliding_window=None)
-> [T, Hq, D]: tokens [cu_q_lens[b], cu_q_lens[b + 1]) are the last ones of the kv_lens[b] tokens of sequence b, and
attend causally. Tokens of no sequence give zeros.

kv_write(kv, k [T, Hkv, D], v [T, Hkv, D], slots i32[T]) -> kv: puts each token in slot `page * page_size + offset`.

A page beyond a sequence's length is never read into a result; page 0, the null page, pads tables.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from .paged_attention_reference import kv_write_reference, paged_decode_reference, paged_prefill_reference
from .paged_attention_xla import kv_write_xla, paged_decode_xla, paged_prefill_xla

OPTIONS = ("scale", "soft_cap", "sliding_window")  # static


def _once(op: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An op in its own jit, so that a model's layers trace and lower it once."""
    return jax.jit(op, static_argnames=OPTIONS)


PAGED_DECODE = {"xla": _once(paged_decode_xla), "reference": _once(paged_decode_reference)}
PAGED_PREFILL = {"xla": _once(paged_prefill_xla), "reference": _once(paged_prefill_reference)}
KV_WRITE = {"xla": jax.jit(kv_write_xla), "reference": jax.jit(kv_write_reference)}


class PagedOps(NamedTuple):
    """One implementation of the three ops."""

    impl: str
    decode: Callable[..., jax.Array]
    prefill: Callable[..., jax.Array]
    kv_write: Callable[..., jax.Array]


def paged_ops(impl: str) -> PagedOps:
    """The ops of an implementation; `auto` is the fastest that this platform has. No fallback for a name."""
    name = "xla" if impl == "auto" else impl
    if name not in PAGED_DECODE:
        raise ValueError(f"attention_impl={impl!r}; accepted: auto, {', '.join(PAGED_DECODE)}")
    return PagedOps(name, PAGED_DECODE[name], PAGED_PREFILL[name], KV_WRITE[name])
