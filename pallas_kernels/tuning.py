"""Block sizes by platform, as measured (`experiments/LOG.md`)."""

from typing import NamedTuple


class XlaTiles(NamedTuple):
    """Tiles of the XLA path: KV tokens gathered at a time, queries per block, and blocks per loop iteration."""

    block_kv: int
    block_q: int
    decode_blocks: int
    prefill_blocks: int


XLA_TILES = {
    "cpu": XlaTiles(block_kv=256, block_q=64, decode_blocks=1, prefill_blocks=1),
    "gpu": XlaTiles(block_kv=256, block_q=128, decode_blocks=64, prefill_blocks=8),
}


def xla_tiles(platform: str) -> XlaTiles:
    """The tiles for a JAX platform name; the GPU's for one that is not in the table."""
    return XLA_TILES.get(platform, XLA_TILES["gpu"])
