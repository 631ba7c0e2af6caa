"""Block sizes by device and shape, as measured (`experiments/LOG.md`)."""

from typing import NamedTuple

import jax


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


class LinearTiles(NamedTuple):
    """Of the Mosaic products of few rows."""

    block_n: int  # columns of a tile; as many of gate and of up
    block_k: int  # at most; rows of the weight a step
    stages: int  # at most


class PrefillTiles(NamedTuple):
    """Of the Mosaic prefill kernel."""

    block_kv: int
    stages: int
    num_ctas: int
    max_paired: int  # tiles of the longest sequence up to which they go in pairs (`prefill_work`)


class Shape(NamedTuple):
    """What tiles depend on, beside the device."""

    head_dim: int
    group: int  # query heads per KV head
    page_size: int


# By device and shape, as measured; `python -m experiments.kernels --tune` prints such lines.
DECODE_TILES: dict[tuple[str, Shape], DecodeTiles] = {
    ("NVIDIA H100 80GB HBM3", Shape(128, 4, 16)): DecodeTiles(128, 2, 132, 0),
    ("NVIDIA H200", Shape(128, 4, 16)): DecodeTiles(128, 2, 132, 0),
    ("NVIDIA H200", Shape(64, 4, 16)): DecodeTiles(128, 2, 264, 0),
}
PREFILL_TILES: dict[tuple[str, Shape], PrefillTiles] = {
    ("NVIDIA H100 80GB HBM3", Shape(128, 4, 16)): PrefillTiles(128, 2, 132, 16),
}
NUM_SMS = 132  # where there is no GPU to ask: those of an H100 or H200


def decode_tiles(shape: Shape, tokens_per_seq: int, batch_invariant: bool) -> DecodeTiles:
    """The first device's tiles. A shape not in the table gets blocks of 128, two of K and of V, and as many CTAs as run
    at once: one an SM at head size 128, two at 64.

    In the batch-invariant schedule a split is 2048 tokens, or more where the longest sequence allowed would have over
    16 splits, so it follows from the configuration alone.
    """
    kind, num_sms = _device()
    default = DecodeTiles(128, 2, num_sms * (2 if shape.head_dim == 64 else 1), 0)
    tiles = DECODE_TILES.get((kind, shape), default)
    split_blocks = max(2048 // tiles.block_kv, -(-tokens_per_seq // (16 * tiles.block_kv)))
    return tiles._replace(split_blocks=split_blocks) if batch_invariant else tiles


def prefill_tiles(shape: Shape) -> PrefillTiles:
    """The same for prefill: blocks of 128, two of K and of V, a CTA an SM; tiles in pairs up to 2048 tokens, or always
    where no query heads share K and V."""
    kind, num_sms = _device()
    default = PrefillTiles(128, 2, num_sms, 16 if shape.group > 1 else 1 << 20)
    return PREFILL_TILES.get((kind, shape), default)


def _device() -> tuple[str, int]:
    device = jax.devices()[0]
    return device.device_kind, getattr(device, "core_count", NUM_SMS) if device.platform == "gpu" else NUM_SMS


def linear_tiles(op: str, rows: int, columns: int) -> LinearTiles:
    """For `project` or `add` of so many rows with a weight of so many columns: wide tiles, for each reads all of x, but
    not so wide that most SMs are idle."""
    if op == "project":
        return LinearTiles(128, 64, 8) if wide(columns) else LinearTiles(64, 128 if rows <= 64 else 64, 8)
    narrow = rows <= 16 and columns < 64 * 64
    return LinearTiles(32 if narrow else 64, 128 if rows <= 64 else 64, 8)


def wide(columns: int) -> bool:
    """Whether a weight has more tiles of 64 columns than there are SMs."""
    return columns > 64 * NUM_SMS and columns % 128 == 0
