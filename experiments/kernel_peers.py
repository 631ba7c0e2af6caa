"""Other attention kernels on the inputs of `experiments.kernels`: paged ones of JAX and cuDNN; dense: cuDNN, torch."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp

from .kernel_trials import SCALE, Inputs, Result, Trial, median_seconds, timed


def run_jax_paged(case: Trial, inputs: Inputs, k_splits: int) -> Result:
    """JAX's Triton kernel, which refuses prefill; K and V are pools of their own, `[Hkv, P, page_size, D]`."""
    kernel = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention").paged_attention
    held = (inputs.kv[:, 0].swapaxes(0, 1) * SCALE, inputs.kv[:, 1].swapaxes(0, 1), inputs.lens[0])
    op = partial(kernel, k_splits=k_splits)
    return timed(inputs, lambda q, held, table: op(q, *held[:2], table, held[2]), inputs.q, held, inputs.tables)


def run_cudnn_paged(case: Trial, inputs: Inputs) -> Result:
    """cuDNN's paged attention, which JAX keeps to itself; each set has pools of K and V, `[P, page_size, Hkv, D]`."""
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    shape = (case.batch, -1, case.num_q_heads, case.head_dim)
    order = jax.random.permutation(jax.random.key(2), inputs.tables[0].size).astype(jnp.int32)
    places = jnp.argsort(order).astype(jnp.int32).reshape(case.batch, 1, -1, 1)
    sets = [tuple(inputs.kv[t.ravel()[order], i].swapaxes(1, 2) for i in (0, 1)) for t in inputs.tables]
    q = inputs.q.reshape(shape)
    q_lens = jnp.full(case.batch, q.shape[1], jnp.int32)
    mask = cudnn.MaskType.PADDING if case.kind == "decode" else cudnn.MaskType.PADDING_CAUSAL
    attend = partial(cudnn.paged_attention, scale=SCALE, mask_type=mask, qkv_layout="BTNH")

    def op(q, held, kv):
        q_lens, kv_lens, places = held
        return attend(q, *kv, q_lens, kv_lens, places, places)

    return timed(inputs, op, q, (q_lens, inputs.lens[0], places), sets)


def dense(case: Trial, inputs: Inputs) -> tuple[jax.Array, list[tuple[jax.Array, ...]]]:
    """Queries `[B, T, Hq, D]`, and the sets' pages as dense caches of K and V, `[B, S, Hkv, D]`."""
    shape = (case.batch, -1, case.num_kv_heads, case.head_dim)
    sets = [tuple(inputs.kv[table, i].swapaxes(2, 3).reshape(shape) for i in (0, 1)) for table in inputs.tables]
    return inputs.q.reshape(case.batch, -1, case.num_q_heads, case.head_dim), sets


def run_cudnn(case: Trial, inputs: Inputs) -> Result:
    """cuDNN's attention over a dense cache; padded where the batch is ragged."""
    options = {"scale": SCALE, "is_causal": case.kind == "prefill", "implementation": "cudnn"}
    attend, (q, sets) = partial(jax.nn.dot_product_attention, **options), dense(case, inputs)
    lens = inputs.lens[0] if case.kv_lens else None
    return timed(inputs, lambda q, lens, kv: attend(q, *kv, key_value_seq_lengths=lens), q, lens, sets)


def run_torch(case: Trial, inputs: Inputs) -> Result:
    """torch's attention over a dense cache; a CUDA graph in place of the jit."""
    torch = importlib.import_module("torch")
    if case.kv_lens:
        raise ValueError("equal lengths only")
    q, sets = jax.tree.map(lambda x: torch.from_dlpack(x).transpose(1, 2), jax.block_until_ready(dense(case, inputs)))
    options = {"scale": SCALE, "enable_gqa": True, "is_causal": case.kind == "prefill"}
    attend = partial(torch.nn.functional.scaled_dot_product_attention, **options)
    out = attend(q, *sets[0]).transpose(1, 2).float().cpu().numpy().reshape(inputs.q.shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(inputs.num_calls):
            q = attend(q, *sets[i % len(sets)])
    return median_seconds(graph.replay, lambda _: torch.cuda.synchronize()) / inputs.num_calls, out


JAX_PAGED = {f"jax-paged k_splits={n}": partial(run_jax_paged, k_splits=n) for n in (1, 4, 16)}
PEERS = JAX_PAGED | {"cudnn-paged": run_cudnn_paged, "cudnn": run_cudnn, "torch": run_torch}
