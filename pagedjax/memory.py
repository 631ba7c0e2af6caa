"""How many pages the pool gets, what is free beside weights and a step's temporaries, and with that the context."""

import logging
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from .adjustments import make_adjustments
from .batch import make_batch
from .config import EngineConfig, ResolvedConfig, memory_fraction
from .host_pages import staged_bytes
from .kv_cache import bytes_per_page, make_kv_cache
from .models.llama import Llama
from .page_pool import NULL_PAGE
from .pallas_kernels.dispatch import PagedOps
from .runner import make_step, sample_shapes
from .sampler import COMMON_LOGPROBS, Features, make_masks
from .schedule import Schedule
from .step_state import make_rows

SHORT, ADDRESSES = 4, 1 << 20  # layers; bytes
PAGES_MULTIPLE = 128  # a few bytes more or less in use must not ask for other compilations

logger = logging.getLogger(__name__)


def resolve_config(config: EngineConfig, model: Llama, ops: PagedOps, executables: Path | None) -> ResolvedConfig:
    """Sizes the pool, and the context by the pool."""
    platform = jax.default_backend()
    context = config.max_model_len or model.config.max_position_embeddings
    model_bytes = sum(x.size * x.dtype.itemsize for x in model.shapes.values())
    sizes = config.resolve(platform, context, 2, model_bytes)
    step_bytes, page_bytes = 0, bytes_per_page(model.config, config.page_size, model.dtype)
    if config.num_pages is None and platform == "gpu":
        step_bytes = largest_step_bytes(sizes, model, ops, executables) + staged_bytes(config, page_bytes)
    most = 1 + sizes.max_num_seqs * sizes.pages_per_seq  # and the null page
    num_pages = pool_pages(config, page_bytes, step_bytes, most)
    capacity = (num_pages - 1) * config.page_size  # the null page holds nothing
    if context > capacity and config.max_model_len is not None:
        raise ValueError(
            f"max_model_len={context} needs {-(-context // config.page_size)} pages of {config.page_size} tokens "
            f"and the pool has {num_pages - 1}; accepted: at most {capacity}, or more pages (num_pages, "
            "gpu_memory_utilization, cpu_kv_cache_bytes)"
        )
    if context > capacity:
        logger.warning("max_model_len is %d, what the pool can hold, not the model's %d", capacity, context)
    return config.resolve(platform, min(context, capacity), num_pages, model_bytes)


def pool_pages(config: EngineConfig, page_bytes: int, step_bytes: int, most: int) -> int:
    """Pages that fit, the null page included. Call once the weights are on the device.

    `step_bytes`: temporaries and outputs of the largest step. `most`: what all rows could fill; a CPU, whose memory
    others want too, takes no more. Raises ValueError if not even two pages fit.
    """
    if config.num_pages is not None:
        return config.num_pages
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform == "gpu" else None
    if not stats:
        return min(max(config.cpu_kv_cache_bytes // page_bytes, 2), most)
    limit, in_use, share = stats["bytes_limit"], stats["bytes_in_use"], memory_fraction()
    wanted = config.gpu_memory_utilization
    if share < wanted:
        logger.warning(
            "gpu_memory_utilization=%.2f was asked for, but JAX holds %.2f of the device's memory: its share is fixed "
            "when its backend starts. Set XLA_PYTHON_CLIENT_MEM_FRACTION=%.2f before jax is imported.",
            wanted,
            share,
            wanted,
        )
    budget = int(limit * min(1.0, wanted / share))
    pages = (budget - in_use - step_bytes) // page_bytes
    pages -= pages % PAGES_MULTIPLE if pages > 64 * PAGES_MULTIPLE else 0
    if pages < 2:
        raise ValueError(
            f"gpu_memory_utilization={wanted}: of {budget >> 20} MiB, {in_use >> 20} MiB are in use and "
            f"{step_bytes >> 20} MiB are needed by a step, which leaves no room for pages of {page_bytes} bytes"
        )
    logger.info(
        "memory: budget %d MiB, in use %d MiB, step %d MiB, pool %d pages (%d MiB)",
        budget >> 20,
        in_use >> 20,
        step_bytes >> 20,
        pages,
        pages * page_bytes >> 20,
    )
    return pages


def largest_step_bytes(config: ResolvedConfig, model: Llama, ops: PagedOps, folder: Path | None = None) -> int:
    """What the pool must leave free: temporaries and outputs of the largest step, and of the sampler with all its
    features beside the adjustments' state, by compiling both.

    Layers use the same buffers one after the other, so a model of a few shows what all of them need but for arguments'
    addresses.
    """
    short = replace(model, config=replace(model.config, num_layers=min(SHORT, model.config.num_layers)))
    step, buckets = make_step(config, short, ops, Counter(), folder)
    bucket, num_seqs, vocab_size = buckets.mixed[-1], config.max_num_seqs, model.config.vocab_size
    params = tuple(short.shapes.values())
    kv = jax.eval_shape(lambda: make_kv_cache(short.config, NULL_PAGE + 2, config.page_size, short.dtype))
    rows = jax.eval_shape(lambda: make_rows(num_seqs, config.pages_per_seq))
    adjustments = jax.eval_shape(lambda: make_adjustments(num_seqs + 1, vocab_size))
    masks = jax.eval_shape(lambda: make_masks(num_seqs, vocab_size))
    packed = jax.ShapeDtypeStruct((make_batch(Schedule([], []), bucket, num_seqs).size,), jnp.int32)
    functions = {
        step.forward(bucket): (params, kv, rows, packed),
        step.sample(num_seqs, heaviest(vocab_size)): (
            params,
            *sample_shapes(model, num_seqs),
            rows,
            adjustments,
            masks,
        ),
    }
    with ThreadPoolExecutor(len(functions)) as threads:
        for future in [threads.submit(function.ready, *args) for function, args in functions.items()]:
            future.result()
    memory = [function.memory_analysis() for function in functions]
    temporaries = [f"{m.temp_size_in_bytes >> 20} MiB" for m in memory]
    logger.info("temporaries: %s in the largest step, %s in the sampler of %d rows", *temporaries, num_seqs)
    state = sum(math.prod(x.shape) * x.dtype.itemsize for x in adjustments)
    new = sum(m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes for m in memory)
    return new + state + ADDRESSES


def heaviest(vocab_size: int) -> Features:
    """What needs most memory of what users ask for, logprobs of the whole vocabulary left aside."""
    return Features(
        random=True, truncated=True, adjusted=True, masked=True, num_logprobs=min(*COMMON_LOGPROBS, vocab_size)
    )
