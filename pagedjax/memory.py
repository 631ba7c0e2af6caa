"""How many pages the pool gets: what is free on the device after weights and a step's temporaries."""

import logging

import jax

from .config import EngineConfig, memory_fraction

PAGES_MULTIPLE = 128  # a few bytes more or less in use must not ask for other compilations

logger = logging.getLogger(__name__)


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
