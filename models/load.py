"""From a checkpoint to parameters on the device, one tensor at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from .config import LlamaConfig, token_ids
from .llama import Llama, Params
from .safetensors import SafetensorsFolder, read_json

HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


@runtime_checkable
class Checkpoint(Protocol):
    """What loading needs of a file format."""

    def config(self) -> dict[str, Any]: ...
    def generation_config(self) -> dict[str, Any]: ...
    def tensors(self) -> Iterator[tuple[str, np.ndarray]]: ...


class ConfigFile:
    """A config.json alone: a shape without weights."""

    def __init__(self, path: Path):
        self.path = path

    def config(self) -> dict[str, Any]:
        return read_json(self.path)

    def generation_config(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        raise ValueError(f"model={str(self.path)!r} has no weights; accepted with load_format='dummy' alone")


def open_checkpoint(model: str) -> tuple[Checkpoint, Path]:
    """Opens a .gguf file, a checkpoint folder, a hub id or a config.json; returns it with its local path.

    Raises ValueError for a path or id that holds no model.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        from .gguf import GGUFFile

        if not path.is_file():
            raise ValueError(f"model={model!r} does not exist")
        return GGUFFile(path), path
    if path.suffix == ".json" and path.is_file():
        return ConfigFile(path), path
    if not path.is_dir():
        path = download(model)
    return SafetensorsFolder(path), path


def download(model: str) -> Path:
    """The local snapshot of a hub model: its JSON, tokenizer and safetensors files, no others."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"model={model!r} is neither an existing folder, a .gguf file nor a hub id (owner/name)")
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"model={model!r} is no local folder and could not be had from the hub: {reason}") from error


def read_config(checkpoint: Checkpoint) -> LlamaConfig:
    """The architecture, with `generation_config.json`'s end-of-sequence ids, which win over `config.json`'s."""
    config = LlamaConfig.from_hf(checkpoint.config())
    eos = token_ids(checkpoint.generation_config().get("eos_token_id"))
    return replace(config, eos_token_ids=eos or config.eos_token_ids)


def load_params(model: Llama, tensors: Iterable[tuple[str, np.ndarray]]) -> Params:
    """Puts a checkpoint's tensors on the default device in the model's dtype and layout, fusing projections if it is
    fused.

    Host memory holds two tensors at most: one on its way to the device, one being read. Raises ValueError naming a
    missing, unexpected or misshapen tensor.
    """
    expected = hf_shapes(model.config)
    params: Params = {}
    seen: set[str] = set()
    for name, value in tensors:
        if name in seen or name not in expected:
            if _ignorable(name, model.config):
                continue
            raise ValueError(f"tensor {name!r} is {'there twice' if name in seen else 'not part of this LLaMA'}")
        if tuple(value.shape) != expected[name]:
            raise ValueError(f"tensor {name!r} has shape {list(value.shape)}; expected {list(expected[name])}")
        seen.add(name)
        params[name] = _place(jnp.asarray(value), transpose=_is_matrix(name), dtype=model.dtype)
        if model.fused:
            _fuse_ready(params, name, model.config)
    if missing := sorted(expected.keys() - seen):
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors, {missing[0]!r} the first")
    return {name: params[name] for name in model.shapes}


def hf_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint, as Hugging Face stores it: matrices are [out, in]."""
    shapes = Llama(config).shapes
    return {name: s.shape[::-1] if _is_matrix(name) else s.shape for name, s in shapes.items()}


def _is_matrix(name: str) -> bool:
    return name.endswith(("_proj.weight", "lm_head.weight"))


def _ignorable(name: str, config: LlamaConfig) -> bool:
    """Buffers that old checkpoints carry, and a tied head stored beside its embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


@partial(jax.jit, static_argnames=("transpose", "dtype"))
def _place(x: jax.Array, transpose: bool, dtype: Any) -> jax.Array:
    return jnp.copy(x.T if transpose else x).astype(dtype)


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def parts_of(name: str) -> list[str]:
    """The parameters that one of a fused model joins, by name; itself alone if it is none of these."""
    wholes = [(whole, parts) for whole, parts in FUSED.items() if f".{whole}." in name]
    return [name.replace(whole, part) for whole, parts in wholes for part in parts] or [name]


def _fuse_ready(params: Params, name: str, config: LlamaConfig) -> None:
    """Replaces the parts of a fused projection by the whole, once `name` has completed them."""
    for whole, parts in FUSED.items():
        for part in parts:
            if f".{part}." in name:
                names = [name.replace(part, sibling) for sibling in parts]
                if all(sibling in params for sibling in names):
                    arrays = tuple(params.pop(sibling) for sibling in names)
                    params[name.replace(part, whole)] = fuse(arrays, config)
                return


@partial(jax.jit, static_argnames="config")
def fuse(parts: tuple[jax.Array, ...], config: LlamaConfig) -> jax.Array:
    """[in, Hkv, G + 2, D] of q, k and v, or [in, 2, intermediate] of gate and up; biases lack `in`."""
    lead = parts[0].shape[:-1]
    if len(parts) == 2:
        return jnp.stack(parts, axis=-2)
    hkv, d = config.num_kv_heads, config.head_dim
    return jnp.concatenate([part.reshape(*lead, hkv, -1, d) for part in parts], axis=-2)


def dummy_params(model: Llama, seed: int) -> Params:
    """Random parameters made on the device, for measuring speed without a checkpoint."""
    std = model.config.initializer_range
    params: Params = {}
    key = jax.random.key(seed)
    for i, (name, spec) in enumerate(model.shapes.items()):
        if name.endswith("norm.weight"):
            params[name] = jnp.ones(spec.shape, spec.dtype)
        else:
            params[name] = _normal(jax.random.fold_in(key, i), std, spec.shape, spec.dtype)
    return params


@partial(jax.jit, static_argnames=("std", "shape", "dtype"))
def _normal(key: jax.Array, std: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)
