"""A LLaMA GGUF file as a `transformers` model: the independent implementation that pagedjax is compared with.

Needs torch, transformers and gguf; imports neither jax nor pagedjax.
"""

import re
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def metadata(reader: gguf.GGUFReader, key: str):
    """The value stored under `key`; KeyError where the file has none."""
    return reader.fields[key].contents()


def llama_config(reader: gguf.GGUFReader) -> LlamaConfig:
    """The `LlamaConfig` that the file's `llama.*` metadata describe."""
    return LlamaConfig(
        vocab_size=metadata(reader, "llama.vocab_size"),
        hidden_size=metadata(reader, "llama.embedding_length"),
        intermediate_size=metadata(reader, "llama.feed_forward_length"),
        num_hidden_layers=metadata(reader, "llama.block_count"),
        num_attention_heads=metadata(reader, "llama.attention.head_count"),
        num_key_value_heads=metadata(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=metadata(reader, "llama.context_length"),
        # Stored as float32: 1e-5 reads back as 9.9999997e-06.
        rms_norm_eps=float(f"{metadata(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata(reader, "llama.rope.freq_base")},
        tie_word_embeddings=not any(tensor.name == "output.weight" for tensor in reader.tensors),
    )


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo GGUF's row order of a query or key projection, `[num_heads * head_dim, hidden]`.

    GGUF interleaves the two halves of every head, so that its rotary embedding turns neighbouring rows;
    transformers turns row i with row i + head_dim / 2.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def state_dict(reader: gguf.GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """The file's tensors, dequantised to float32, under transformers' names and in its row order."""
    num_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in TOP_NAMES:
            state[TOP_NAMES[tensor.name]] = weight
            continue
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if match is None or match[2] not in LAYER_NAMES:
            raise ValueError(f"tensor {tensor.name!r} has no place in a LLaMA model")
        if match[2] in num_heads:
            weight = unpermute(weight, num_heads[match[2]])
        state[f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"] = weight
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def load_llama(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model in the GGUF file at `path`, its weights in `dtype`.

    The model is built in `dtype`: a conversion by `.to(dtype)` would round the rotary frequencies too.
    """
    reader = gguf.GGUFReader(path)
    config = llama_config(reader)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.load_state_dict(state_dict(reader, config))
    return model.eval()
