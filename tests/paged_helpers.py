"""Random pages for tests of attention: permuted tables, poison in every slot that no sequence owns."""

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax.models.rope import apply_rope, rotation
from pagedjax.pallas_kernels.linear import end_stream, start_stream
from pagedjax.pallas_kernels.paged_attention_reference import kv_write_reference

# Relative error ||out - reference|| / ||reference||. Inputs are exact in both; weights and outputs are rounded to 8
# (bfloat16) or 11 (float16) bits, so errors of 2^-9 and 2^-12 apiece, averaged over many terms.
MAX_ERROR = {"bfloat16": 1e-2, "float16": 2e-3}
UNIT = {"bfloat16": 2**-7, "float16": 2**-10}  # of the last place, relative


class Pages:
    """kv, page_table and kv_lens with the given lengths."""

    def __init__(self, kv_lens, case, *, pages_per_seq=None, num_pages=None, seed=0, poison=np.nan):
        rng = np.random.default_rng(seed)
        size = case.page_size
        used = [-(-int(n) // size) for n in kv_lens]
        pages_per_seq = pages_per_seq or max(*used, 1) + 1
        num_pages = num_pages or 2 + sum(used)
        kv = rng.standard_normal((num_pages, 2, case.num_kv_heads, size, case.head_dim), np.float32)
        table = np.zeros((len(kv_lens), pages_per_seq), np.int32)
        free = rng.permutation(np.arange(1, num_pages)).tolist()
        live = np.zeros((num_pages, size), bool)
        for row, kv_len in enumerate(kv_lens):
            for i in range(used[row]):
                table[row, i] = page = free.pop()
                live[page, : min(size, kv_len - i * size)] = True
        kv[~np.broadcast_to(live[:, None, None, :], kv.shape[:4])] = poison
        self.kv = jnp.asarray(kv, case.dtype)
        self.page_table = jnp.asarray(table)
        self.kv_lens = jnp.asarray(kv_lens, jnp.int32)
        self.case, self.rng = case, rng

    def queries(self, count):
        q = self.rng.standard_normal((count, self.case.num_q_heads, self.case.head_dim), np.float32)
        return jnp.asarray(q, self.case.dtype)

    def args(self, count, *more):
        return self.queries(count), self.kv, self.page_table, self.kv_lens, *more

    def new_tokens(self):
        """Packed projections of each sequence's last token, its rotation, and the slots where its K and V belong."""
        case, last = self.case, np.maximum(np.asarray(self.kv_lens) - 1, 0)
        shape = (len(last), case.num_kv_heads, case.num_q_heads // case.num_kv_heads + 2, case.head_dim)
        page = np.asarray(self.page_table)[np.arange(len(last)), last // case.page_size]
        slots = jnp.asarray(page * case.page_size + last % case.page_size, jnp.int32)
        qkv = jnp.asarray(self.rng.standard_normal(shape, np.float32), case.dtype)
        return qkv, rotation(jnp.asarray(last), frequencies_of(case.head_dim)), slots


def frequencies_of(head_dim):
    return np.float32(10_000) ** -(np.arange(head_dim // 2, dtype=np.float32) / (head_dim // 2))


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    return np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_same_pool(actual, expected, dtype):
    """Up to one unit in the last place: what is rotated in float32 may fall on either side of where it is rounded."""
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, rtol=UNIT[dtype], atol=1e-6)


def grow_keys(pages):
    """Multiplies the keys of a sequence's n-th page by n, so that the maxima of its scores go on growing."""
    factors = np.ones(pages.kv.shape[0], np.float32)
    for row in np.asarray(pages.page_table):
        factors[row] = np.arange(1, len(row) + 1)
    keys = pages.kv[:, 0] * jnp.asarray(factors, pages.kv.dtype)[:, None, None, None]
    pages.kv = pages.kv.at[:, 0].set(keys)
    return pages


def pairs_of_products(key, sizes, add, project, eps=1e-5):
    """Results of a stream's start, `add` and `project` on random values, and the same in float32, by name.

    `sizes`: rows, K of `add`'s weight, the stream's width, columns of `project`'s weight and its parts.
    """
    rows, k, width, columns, parts = sizes
    keys = jax.random.split(key, 6)

    def draw(i, *shape):
        return (jax.random.normal(keys[i], shape) * (1 if i < 2 else shape[0] ** -0.5)).astype(jnp.bfloat16)

    x, y, weight, gate_up = draw(0, rows, width), draw(1, rows, k), draw(2, k, width), draw(3, width, parts, columns)
    norms = [1 + jax.random.normal(keys[i], (width,), jnp.bfloat16) / 8 for i in (4, 5)]
    stream = start_stream(x, norms[0])
    added = add(stream, y, weight, norms[1])
    out = {
        "first": project(stream, gate_up, eps=eps),
        "x": added.x,
        "then": project(added, gate_up, eps=eps),
        "last": end_stream(added, eps),
    }

    def normed(x, norm):
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * norm

    def projected(x):
        hidden = np.einsum("mh,hgn->mgn", x, gate_up)
        return hidden[:, 0] if parts == 1 else hidden[:, 0] / (1 + np.exp(-hidden[:, 0])) * hidden[:, 1]

    x, y, weight, gate_up, *norms = (np.asarray(a, np.float32) for a in (x, y, weight, gate_up, *norms))
    total = x + y @ weight
    last = normed(total, norms[1])
    return out, {"first": projected(normed(x, norms[0])), "x": total, "then": projected(last), "last": last}


def qkv_projection(key, sizes, project_qkv, eps=1e-5, page_size=16):
    """Results of a projection of random values with its rotation and write, and the same in float32, by name.

    `sizes`: rows, the stream's width, KV heads, query heads of each, head size.
    """
    rows, width, num_kv_heads, group, head_dim = sizes
    keys = jax.random.split(key, 6)
    x = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
    shape = width, num_kv_heads, group + 2, head_dim
    weight = (jax.random.normal(keys[1], shape) * width**-0.5).astype(jnp.bfloat16)
    norm = 1 + jax.random.normal(keys[2], (width,), jnp.bfloat16) / 8
    kv = jax.random.normal(keys[3], (rows, 2, num_kv_heads, page_size, head_dim), jnp.bfloat16)
    slots = jax.random.permutation(keys[4], rows * page_size)[:rows].astype(jnp.int32)
    positions = jax.random.randint(keys[5], (rows,), 0, 10_000)
    frequencies = frequencies_of(head_dim)
    qkv, pool = project_qkv(start_stream(x, norm), weight, kv, rotation(positions, frequencies), slots, eps=eps)

    x, weight, norm = (a.astype(jnp.float32) for a in (x, weight, norm))
    normed = x * jax.lax.rsqrt((x * x).mean(axis=1, keepdims=True) + eps) * norm
    projected = jnp.einsum("mh,hgrd->mgrd", normed, weight, precision="highest")
    turned = [apply_rope(projected[:, :, i], positions, frequencies) for i in range(group + 1)]
    turned = jnp.stack([*turned, projected[:, :, -1]], axis=2)
    expected = kv_write_reference(kv.astype(jnp.float32), turned[:, :, -2], turned[:, :, -1], slots)
    return {"qkv": qkv[:, :, :group], "kv": pool}, {"qkv": turned[:, :, :group], "kv": expected}
