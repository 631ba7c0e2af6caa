"""What the ops accept, checked before anything is launched."""

from typing import Any

import jax
import jax.numpy as jnp

HEAD_DIMS = (64, 128)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float16")
MAX_GROUP = 32  # at head size 128, 64 queries beside two blocks of K and V exceed shared memory


def unsupported(head_dim: int, group: int, page_size: int, dtype: Any) -> str | None:
    """Why the Mosaic kernels do not take this shape; None if they do."""
    checks = (
        (head_dim in HEAD_DIMS, f"head_dim={head_dim}; accepted: {_list(HEAD_DIMS)}"),
        (group <= MAX_GROUP, f"query heads per KV head={group}; accepted: 1 to {MAX_GROUP}"),
        (page_size in PAGE_SIZES, f"page_size={page_size}; accepted: {_list(PAGE_SIZES)}"),
        (jnp.dtype(dtype).name in DTYPES, f"dtype={jnp.dtype(dtype).name}; accepted: {_list(DTYPES)}"),
    )
    return next((message for fine, message in checks if not fine), None)


def check_attention(impl: str, options: dict[str, Any], q, kv, page_table, kv_lens, cu_q_lens=None) -> None:
    """Raises ValueError on arguments of paged_decode, or with `cu_q_lens` of paged_prefill, that do not fit."""
    _check_pool(kv)
    num_kv_heads, page_size, head_dim = kv.shape[2:]
    _accept(q.ndim == 3 and q.shape[2] == head_dim, "q", q.shape, f"[tokens, query heads, {head_dim}] as kv has it")
    fits = q.shape[1] > 0 and q.shape[1] % num_kv_heads == 0
    _accept(fits, "q", q.shape, f"query heads a multiple of kv's {num_kv_heads}")
    _accept(q.dtype == kv.dtype, "q", q.dtype, f"kv's dtype, {kv.dtype}")
    _accept(kv_lens.ndim == 1, "kv_lens", kv_lens.shape, "[B]")
    batch = kv_lens.shape[0]
    _accept(page_table.ndim == 2 and page_table.shape[0] == batch, "page_table", page_table.shape, f"[{batch}, pages]")
    integers = {"page_table": page_table, "kv_lens": kv_lens}
    if cu_q_lens is None:
        _accept(q.shape[0] == batch, "q", q.shape, f"one token for each of the {batch} kv_lens")
    else:
        _accept(cu_q_lens.shape == (batch + 1,), "cu_q_lens", cu_q_lens.shape, f"[{batch + 1}]")
        integers["cu_q_lens"] = cu_q_lens
    for name, array in integers.items():
        _accept(array.dtype == jnp.int32, name, array.dtype, "int32")
    _check_options(**options)
    if impl == "mosaic":
        problem = unsupported(head_dim, q.shape[1] // num_kv_heads, page_size, kv.dtype)
        if problem:
            raise ValueError(f"attention_impl='mosaic' does not take {problem}; attention_impl='xla' takes any")


def check_write(kv, k, v, slots) -> None:
    """The same for kv_write."""
    _check_pool(kv)
    shape = (slots.shape[0] if slots.ndim == 1 else None, kv.shape[2], kv.shape[4])
    _accept(slots.ndim == 1 and slots.dtype == jnp.int32, "slots", f"{slots.dtype}{slots.shape}", "int32 [T]")
    for name, array in (("k", k), ("v", v)):
        _accept(array.shape == shape, name, array.shape, str(shape))


def check_packed(impl: str, options: dict[str, Any], qkv, kv, page_table, kv_lens) -> None:
    """The same for attention on packed projections."""
    _check_pool(kv)
    num_kv_heads, _, head_dim = kv.shape[2:]
    fits = qkv.ndim == 4 and (qkv.shape[1], qkv.shape[3]) == (num_kv_heads, head_dim) and qkv.shape[2] >= 3
    _accept(fits, "qkv", qkv.shape, f"[tokens, {num_kv_heads}, query heads per KV head + 2, {head_dim}] as kv has it")
    _accept(qkv.dtype == kv.dtype, "qkv", qkv.dtype, f"kv's dtype, {kv.dtype}")
    q = jax.ShapeDtypeStruct((qkv.shape[0], num_kv_heads * (qkv.shape[2] - 2), head_dim), qkv.dtype)
    check_attention(impl, options, q, kv, page_table, kv_lens)


def check_step(impl: str, options: dict[str, Any], qkv, kv, page_table, kv_lens, rotation, slots) -> None:
    """The same for decode_step."""
    check_packed(impl, options, qkv, kv, page_table, kv_lens)
    _check_rotation(rotation, qkv.shape[0], qkv.shape[3])
    k = jax.ShapeDtypeStruct((qkv.shape[0], *kv.shape[2::2]), qkv.dtype)
    check_write(kv, k, k, slots)


def check_copy(kv, sources, targets) -> None:
    """The same for copy_pages."""
    _check_pool(kv)
    for name, array in (("sources", sources), ("targets", targets)):
        fine = array.ndim == 1 and array.dtype == jnp.int32
        _accept(fine, name, f"{array.dtype}{array.shape}", "int32 [C]")
    _accept(sources.shape == targets.shape, "targets", targets.shape, str(sources.shape))


def check_project(stream, weight) -> None:
    """The same for a projection of `linear.py`."""
    _check_rows("x", stream.x)
    _check_weight(weight, (stream.x.shape[1], None, None))
    _accept(weight.shape[1] in (1, 2), "weight", weight.shape, "1 part, or 2: gate and up")


def check_project_qkv(stream, weight, kv, rotation, slots) -> None:
    """The same for its projection of queries, keys and values."""
    _check_rows("x", stream.x)
    _check_pool(kv)
    num_rows, num_kv_heads, head_dim = stream.x.shape[0], kv.shape[2], kv.shape[4]
    _accept(head_dim in HEAD_DIMS, "head_dim", head_dim, _list(HEAD_DIMS))
    _check_weight(weight, (stream.x.shape[1], num_kv_heads, None, head_dim))
    _accept(weight.shape[2] >= 3, "weight", weight.shape, "1 query head per KV head or more, K and V")
    _accept(kv.dtype == weight.dtype, "kv", kv.dtype, str(weight.dtype))
    _check_rotation(rotation, num_rows, head_dim)
    fine = slots.shape == (num_rows,) and slots.dtype == jnp.int32
    _accept(fine, "slots", f"{slots.dtype}{slots.shape}", f"int32 [{num_rows}]")


def check_add(stream, y, weight, norm_weight) -> None:
    """The same for a sum of `linear.py`."""
    _check_rows("x", stream.x)
    _check_rows("y", y)
    num_rows, width = stream.x.shape
    _accept(y.shape[0] == num_rows, "y", y.shape, f"[{num_rows}, K], as many rows as x")
    _check_weight(weight, (y.shape[1], width))
    _accept(norm_weight.shape == (width,), "norm_weight", norm_weight.shape, f"[{width}]")


def _check_rotation(rotation, num_rows: int, head_dim: int) -> None:
    shape = 2, num_rows, head_dim // 2
    _accept(rotation.shape == shape, "rotation", rotation.shape, f"{list(shape)}: cosines and sines of half a head")


def _check_rows(name: str, x) -> None:
    fine = (
        x.ndim == 2 and x.dtype == jnp.bfloat16 and x.shape[0] > 0 and x.shape[0] % (8 if x.shape[0] <= 64 else 64) == 0
    )
    _accept(fine, name, f"{x.dtype}{x.shape}", "bfloat16 [M, K], M a multiple of 8 up to 64, beyond of 64")


def _check_weight(weight, shape: tuple[int | None, ...]) -> None:
    """Of this shape but where that is None, in whole tiles."""
    fits = weight.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, weight.shape, strict=True))
    expected = f"bfloat16 {list(shape)}, rows and columns in multiples of 64".replace("None", "any")
    whole = fits and weight.shape[0] % 64 == weight.shape[-1] % 64 == 0
    _accept(whole and weight.dtype == jnp.bfloat16, "weight", f"{weight.dtype}{weight.shape}", expected)


def _check_pool(kv) -> None:
    fine = kv.ndim == 5 and kv.shape[1] == 2 and 0 not in kv.shape
    _accept(fine, "kv", kv.shape, "[pages, 2, KV heads, page_size, head_dim]")
    _accept(jnp.issubdtype(kv.dtype, jnp.floating), "kv", kv.dtype, "a floating dtype")


def _check_options(scale: float, soft_cap: float | None = None, sliding_window: int | None = None) -> None:
    _accept(scale > 0, "scale", scale, "above 0")
    _accept(soft_cap is None or soft_cap > 0, "soft_cap", soft_cap, "None, or above 0")
    _accept(sliding_window is None or sliding_window >= 1, "sliding_window", sliding_window, "None, or at least 1")


def _accept(fine: bool, name: str, value: Any, accepted: str) -> None:
    if not fine:
        raise ValueError(f"{name}={value}; accepted: {accepted}")


def _list(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))
