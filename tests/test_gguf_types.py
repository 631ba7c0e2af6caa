"""Blocks of GGUF's quantised types against formulas of their definitions."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_helpers import HEAD_DIM, HIDDEN, Q_HEADS, permuted, random, write

from pagedjax.models.gguf import GGUFFile


def halves(blocks: np.ndarray, *offsets: int) -> list[np.ndarray]:
    """float16 fields at byte offsets of each block, as float32 columns `[blocks, 1]`."""
    return [blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in offsets]


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibbles of the last axis, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)


def q8_0(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0)[0] * blocks[:, 2:].view(np.int8)


def q4_0(blocks: np.ndarray) -> np.ndarray:
    return halves(blocks, 0)[0] * (nibbles(blocks[:, 2:]) - 8)


def q4_1(blocks: np.ndarray) -> np.ndarray:
    scale, minimum = halves(blocks, 0, 2)
    return scale * nibbles(blocks[:, 4:]) + minimum


def q4_k(blocks: np.ndarray) -> np.ndarray:
    """Eight groups of 32, each with a 6-bit scale and a 6-bit minimum packed into 12 bytes."""
    scale, minimum = halves(blocks, 0, 2)
    packed = blocks[:, 4:16].astype(int)
    low, mid, top = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.hstack([low & 63, (top & 15) | (low >> 6 << 4)])  # [blocks, 8]
    minima = np.hstack([mid & 63, (top >> 4) | (mid >> 6 << 4)])
    quants = nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return ((scale * scales)[..., None] * quants - (minimum * minima)[..., None]).reshape(-1, 256)


def q6_k(blocks: np.ndarray) -> np.ndarray:
    """Two runs of 128, their low four bits in nibbles and their high two beside; a scale for each 16."""
    low = blocks[:, :128].reshape(-1, 2, 2, 32)  # [blocks, run, half, 32]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    top = (high >> np.array([0, 2, 4, 6]).reshape(1, 1, 4, 1)) & 3
    quants = np.concatenate([low & 15, low >> 4], axis=2) | (top << 4)  # [blocks, run, 4, 32]
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32).reshape(-1, 2, 4, 2, 1)
    values = scales * (quants.reshape(-1, 2, 4, 2, 16).astype(np.float32) - 32)
    return halves(blocks, 208)[0] * values.reshape(-1, 256)


def bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


FORMULAS = {
    Type.Q8_0: (q8_0, (0,)),
    Type.Q4_0: (q4_0, (0,)),
    Type.Q4_1: (q4_1, (0, 2)),
    Type.Q4_K: (q4_k, (0, 2)),
    Type.Q6_K: (q6_k, (208,)),
    Type.BF16: (bf16, ()),
}


@pytest.mark.parametrize("kind", FORMULAS, ids=lambda kind: kind.name)
def test_blocks_dequantise_to_their_definition(tmp_path, kind):
    formula, half_offsets = FORMULAS[kind]
    num_values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (HIDDEN * 2, num_bytes), dtype=np.uint8)
    for at in half_offsets:
        blocks[:, at : at + 2] = rng.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    if kind == Type.BF16:
        blocks[:, 1] &= 0xBF  # no infinities
    rows = blocks.reshape(HIDDEN, -1)
    path = write(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": (rows, kind)})
    [(_, array)] = GGUFFile(path).tensors()
    assert array.dtype == np.float32 and array.shape == (HIDDEN, 2 * num_values)
    np.testing.assert_allclose(array, formula(blocks).reshape(HIDDEN, -1), rtol=1e-6, atol=1e-6)


def test_a_quantised_projection_is_reordered_after_it_is_dequantised(tmp_path):
    q = random(Q_HEADS * HEAD_DIM, HIDDEN)
    blocks = gguf.quants.quantize(permuted(q, Q_HEADS), Type.Q8_0)
    path = write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (blocks, Type.Q8_0)})
    [(_, array)] = GGUFFile(path).tensors()
    np.testing.assert_allclose(array, q, atol=np.abs(q).max() / 127)
