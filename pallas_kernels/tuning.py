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


class DecodeTiles(NamedTuple):
    """Of the Mosaic decode kernel."""

    block_kv: int  # tokens a step
    stages: int  # blocks of K and of V in shared memory
    num_ctas: int  # at most; a multiple of the KV heads is launched
    split_blocks: int  # blocks a split in the batch-invariant schedule; 0: the balanced schedule


class PrefillTiles(NamedTuple):
    """Of the Mosaic prefill kernel."""

    block_kv: int
    stages: int
    num_ctas: int


DECODE_TILES = {  # by head size: two CTAs an SM where a block is small
    64: DecodeTiles(128, 2, 264, 0),
    128: DecodeTiles(128, 2, 132, 0),
}


def decode_tiles(head_dim: int, tokens_per_seq: int, batch_invariant: bool) -> DecodeTiles:
    """A shape's tiles, as measured on an H200 so far.

    In the batch-invariant schedule a split is 2048 tokens, or more where the longest sequence allowed would have over
    16 splits, so it follows from the configuration alone.
    """
    tiles = DECODE_TILES[head_dim]
    split_blocks = max(2048 // tiles.block_kv, -(-tokens_per_seq // (16 * tiles.block_kv)))
    return tiles._replace(split_blocks=split_blocks) if batch_invariant else tiles


def prefill_tiles() -> PrefillTiles:
    """The tiles of every shape, as measured on an H200 so far."""
    return PrefillTiles(128, 2, 132)
