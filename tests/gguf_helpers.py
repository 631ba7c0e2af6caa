"""Small GGUF files, written the way llama.cpp's converter writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCAB, HIDDEN, INNER, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 96, 64, 96, 2, 4, 2, 16
FIELDS: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": Q_HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5e5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "é"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}
# GGUF part, Hugging Face part, shape [out, in]
LAYER_PARTS = [
    ("attn_norm", "input_layernorm", (HIDDEN,)),
    ("attn_q", "self_attn.q_proj", (Q_HEADS * HEAD_DIM, HIDDEN)),
    ("attn_k", "self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    ("attn_v", "self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    ("attn_output", "self_attn.o_proj", (HIDDEN, Q_HEADS * HEAD_DIM)),
    ("ffn_norm", "post_attention_layernorm", (HIDDEN,)),
    ("ffn_gate", "mlp.gate_proj", (INNER, HIDDEN)),
    ("ffn_up", "mlp.up_proj", (INNER, HIDDEN)),
    ("ffn_down", "mlp.down_proj", (HIDDEN, INNER)),
]
ADDERS: dict[type, Callable[..., Any]] = {
    int: gguf.GGUFWriter.add_uint32,
    float: gguf.GGUFWriter.add_float32,
    bool: gguf.GGUFWriter.add_bool,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def llama_tensors() -> dict[str, np.ndarray]:
    """A whole model's tensors under GGUF's names, q and k not permuted."""
    tensors = {"token_embd.weight": random(VOCAB, HIDDEN), "output_norm.weight": random(HIDDEN)}
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{part}.weight": random(*shape) + layer for part, _, shape in LAYER_PARTS}
    return tensors


def write(
    path: Path,
    tensors: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    architecture: str = "llama",
) -> Path:
    """A GGUF file; a tensor may be a pair of block bytes and their type, a field None to leave it out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (FIELDS | (fields or {})).items():
        if value is not None:
            ADDERS[type(value)](writer, key, value)
    for name, tensor in (llama_tensors() if tensors is None else tensors).items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The order in which GGUF keeps the rows of q_proj and k_proj: halves of a head interleaved."""
    out = np.empty_like(rows)
    head_dim = rows.shape[0] // num_heads
    for head in range(num_heads):
        for i in range(head_dim):
            out[head * head_dim + i] = rows[head * head_dim + i // 2 + (i % 2) * (head_dim // 2)]
    return out
