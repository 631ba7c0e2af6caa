"""GGUF files of LLaMA models: their config and weights as Hugging Face names and orders them.

The file is memory-mapped, and one tensor at a time is dequantised. GGUF keeps q_proj and k_proj with the rows
of each head interleaved (its rotary embedding pairs neighbours, Hugging Face's pairs halves). Here they
get Hugging Face's order.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, no_type_check

import gguf
import numpy as np
from jaxtyping import Float

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
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
_ROPE_FREQS = "rope_freqs.weight"
# Fields that change what the model computes, each with the values at which it changes nothing.
_NEUTRAL_VALUES = {
    "llama.expert_count": (0,),
    "llama.attention.sliding_window": (0,),
    "llama.rope.scale_linear": (1.0,),
    "split.count": (0, 1),
}


class _BoundedReader(gguf.GGUFReader):
    """Refuses to read past the end of the file, where the base class returns fewer values than asked for."""

    @no_type_check  # called for each token of the vocabulary: checks at run time would take seconds
    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        dtype = np.dtype(dtype)
        end = int(offset) + dtype.itemsize * int(count)
        if end > self.data.size:
            raise ValueError(f"it is {self.data.size} bytes long, but its contents reach to byte {end}")
        # Slices of the memmap itself, the base class's way, make opening a file three times slower.
        values = np.frombuffer(self.data, dtype, int(count), int(offset))
        return values.view(dtype.newbyteorder(override_order or self.byte_order))


class GGUFFile:
    """One GGUF file of a LLaMA model, opened and checked.

    Raises ValueError, naming the file, when it is truncated, is not GGUF or holds another architecture, and
    OSError when it cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            reader = _BoundedReader(self.path)
        except OSError:
            raise
        except Exception as error:  # whatever the parser trips over in a damaged file
            raise ValueError(f"{self.path}: not a complete GGUF file: {error}") from error
        if (order := reader.endianess.name.lower()) != sys.byteorder:
            raise ValueError(f"{self.path}: {order}-endian, but this machine is {sys.byteorder}-endian")
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        if (architecture := self._value("general.architecture")) != "llama":
            raise ValueError(f"{self.path}: general.architecture={architecture!r}, expected 'llama'")
        for key, neutral in _NEUTRAL_VALUES.items():
            if (value := self._value(key, neutral[0])) not in neutral:
                raise ValueError(f"{self.path}: {key}={value!r} is not supported, expected {neutral[0]}")

    def config(self) -> dict[str, Any]:
        """The model's shape and constants, under the names of a Hugging Face LlamaConfig.

        `rope_scaling` is None, linear, or (for a file of Llama 3.1 and later) `{"rope_type": "freq_factors",
        "freq_factors": [...]}`: head_dim / 2 numbers that divide the rotary frequencies, lowest index first.
        """
        hidden_size = self._count("llama.embedding_length")
        num_q_heads = self._count("llama.attention.head_count")
        head_dim = self._head_dim(hidden_size, num_q_heads)
        if "token_embd.weight" not in self._tensors:
            raise ValueError(f"{self.path}: tensor 'token_embd.weight' is missing")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": int(self._tensors["token_embd.weight"].shape[-1]),
            "hidden_size": hidden_size,
            "intermediate_size": self._count("llama.feed_forward_length"),
            "num_hidden_layers": self._count("llama.block_count"),
            "num_attention_heads": num_q_heads,
            "num_key_value_heads": self._count("llama.attention.head_count_kv", num_q_heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": float(self._value("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": float(self._value("llama.rope.freq_base", 10000.0)),
            "rope_scaling": self._rope_scaling(head_dim),
            "max_position_embeddings": self._count("llama.context_length"),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": self._has_bias("attn"),
            "mlp_bias": self._has_bias("ffn"),
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self._eos_token_id(),
        }

    def generation_config(self) -> dict[str, Any]:
        """Empty: a GGUF file's end-of-sequence ids are all in `config()`."""
        return {}

    def tensors(self) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
        """Each weight under its Hugging Face name, `[out, in]`, in the file's order.

        float16 and float32 tensors are read-only views of the file where their rows need no reordering; all
        others come as float32. Raises ValueError for a tensor that a LLaMA does not have, and for a type that
        gguf cannot dequantise.
        """
        names = [(self._hugging_face_name(tensor.name), tensor) for tensor in self._tensors.values()]
        num_q_heads = self._count("llama.attention.head_count")
        num_kv_heads = self._count("llama.attention.head_count_kv", num_q_heads)
        for name, tensor in names:
            if name is None:
                continue
            array = self._dequantise(tensor)
            if ".q_proj." in name:
                array = _halves_from_neighbours(array, num_q_heads)
            elif ".k_proj." in name:
                array = _halves_from_neighbours(array, num_kv_heads)
            yield name, array

    def tokenizer_metadata(self) -> dict[str, Any]:
        """All `tokenizer.*` fields by their full names, as Python values."""
        return {key: self._value(key) for key in self._fields if key.startswith("tokenizer.")}

    def _value(self, key: str, *default: Any) -> Any:
        """The field's value; without a default, a missing field is an error."""
        if key in self._fields:
            try:
                return self._fields[key].contents()
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.path}: {key} holds text that is not UTF-8: {error}") from error
        if not default:
            raise ValueError(f"{self.path}: field {key!r} is missing")
        return default[0]

    def _count(self, key: str, *default: int) -> int:
        value = self._value(key, *default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.path}: {key}={value!r}, expected one positive integer for all layers")
        return value

    def _head_dim(self, hidden_size: int, num_q_heads: int) -> int:
        head_dim = self._count("llama.attention.key_length", hidden_size // num_q_heads or 1)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if (size := self._count(key, head_dim)) != head_dim:
                raise ValueError(f"{self.path}: {key}={size}, expected the head size, {head_dim}")
        return head_dim

    def _rope_scaling(self, head_dim: int) -> dict[str, Any] | None:
        factor = float(self._value("llama.rope.scaling.factor", 0.0)) or 1.0
        kind = self._value("llama.rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise ValueError(f"{self.path}: llama.rope.scaling.type={kind!r}, expected 'none' or 'linear'")
        linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else None
        if _ROPE_FREQS not in self._tensors:
            return linear
        factors = self._dequantise(self._tensors[_ROPE_FREQS]).ravel()  # [head_dim / 2]
        if linear or factors.size != head_dim // 2:
            raise ValueError(
                f"{self.path}: {_ROPE_FREQS} has {factors.size} values, expected {head_dim // 2}, and "
                f"llama.rope.scaling.factor={factor}, expected 1.0 beside them"
            )
        return {"rope_type": "freq_factors", "freq_factors": [float(value) for value in factors]}

    def _has_bias(self, part: str) -> bool:
        return any(re.fullmatch(rf"blk\.\d+\.{part}_\w+\.bias", name) for name in self._tensors)

    def _eos_token_id(self) -> int | list[int] | None:
        """Every id at which generation ends: end of text, of turn, of message."""
        found = [self._value(f"tokenizer.ggml.{name}_token_id", None) for name in ("eos", "eot", "eom")]
        ids = list(dict.fromkeys(token_id for token_id in found if token_id is not None))
        return ids if len(ids) > 1 else ids[0] if ids else None

    def _hugging_face_name(self, name: str) -> str | None:
        """None for the rope factors, which are part of the config."""
        if name == _ROPE_FREQS:
            return None
        if name in _OUTER_NAMES:
            return _OUTER_NAMES[name]
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            is_norm_bias = kind == "bias" and part.endswith("_norm")
            if part in _LAYER_NAMES and not is_norm_bias and int(layer) < self._count("llama.block_count"):
                return f"model.layers.{int(layer)}.{_LAYER_NAMES[part]}.{kind}"
        raise ValueError(f"{self.path}: tensor {name!r} is not one of a LLaMA's")

    def _dequantise(self, tensor: gguf.ReaderTensor) -> Float[np.ndarray, "..."]:
        if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            return tensor.data
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ValueError(
                f"{self.path}: tensor {tensor.name!r} has type {kind}, which gguf cannot dequantise"
            ) from error


def _halves_from_neighbours(rows: Float[np.ndarray, "..."], num_heads: int) -> Float[np.ndarray, "..."]:
    """Put the rows of each head from (x0, y0, x1, y1, ...) into (x0, x1, ..., y0, y1, ...), biases alike."""
    if rows.shape[0] % (2 * num_heads):
        raise ValueError(f"{rows.shape[0]} rows are not {num_heads} heads of an even size")
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])  # [heads, D / 2, 2, ...]
    return pairs.swapaxes(1, 2).reshape(rows.shape)
