"""The engine's weights: from a caller's tree to the arrays that steps take, when it starts and at every update.

What the tree holds in the engine's layout and dtype stays the tree's own array: nothing is copied, and who donates it
to a training step must bring new weights before the engine steps again. The rest is made, one parameter at a time:
projections that the engine has fused, and dtypes that it does not share. At an update each old one goes before its
successor is made, so that memory never holds more than the tree, one set of what is made, and a piece.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .models.llama import Llama, Params
from .models.load import fuse, parts_of


class Weights:
    """`arrays`, in the order of the model's parameters, and how often they have been replaced: their `version`."""

    def __init__(self, model: Llama, params: Any):
        """As `update` takes them."""
        self.model, self.version = model, 0
        self._separate = Llama(model.config).shapes if model.fused else model.shapes  # traced once, not at each update
        self.compilations: Counter[str] = Counter()
        self._convert = jax.jit(self._joined)
        self.arrays: tuple[Any, ...] = (None,) * len(model.shapes)
        self._replace(params)

    def update(self, params: Any) -> None:
        """Takes a tree: a dict from Hugging Face names to arrays, matrices [in, out] as `Llama.init` gives them, or the
        same nested, such as the Flax NNX state of a `LlamaForCausalLM`; fused as the model is, or not fused.

        ValueError naming what is missing, unexpected or misshapen; the weights are then as before.
        """
        self._replace(params)
        self.version += 1

    def _replace(self, params: Any) -> None:
        tree = self._checked(flatten(params))
        device = jax.devices()[0]
        arrays, self.arrays = list(self.arrays), ()  # else the old ones would live until the last has been made
        try:
            for i, name in enumerate(self.model.shapes):
                arrays[i] = None
                names = [name] if name in tree else parts_of(name)
                parts = tuple(_on(device, tree[part]) for part in names)
                ready = len(parts) == 1 and parts[0].dtype == self.model.dtype
                arrays[i] = parts[0] if ready else self._convert(parts)
        finally:
            self.arrays = tuple(arrays)

    def _joined(self, parts: tuple[jax.Array, ...]) -> jax.Array:
        self.compilations[f"weights {[part.shape for part in parts]} {parts[0].dtype}"] += 1
        whole = parts[0] if len(parts) == 1 else fuse(parts, self.model.config)
        return whole.astype(self.model.dtype)

    def _checked(self, tree: dict[str, Any]) -> dict[str, Any]:
        is_fused = self.model.fused and any("qkv_proj" in name for name in tree)
        expected = self.model.shapes if is_fused else self._separate
        if missing := sorted(expected.keys() - tree.keys()):
            raise ValueError(f"params lack {len(missing)} of the model's {len(expected)}, {missing[0]!r} the first")
        if others := sorted(tree.keys() - expected.keys()):
            raise ValueError(f"params have {len(others)} that are not part of this LLaMA, {others[0]!r} the first")
        for name, value in tree.items():
            if tuple(value.shape) != expected[name].shape:
                shapes = list(value.shape), list(expected[name].shape)
                raise ValueError(f"params[{name!r}] has shape {shapes[0]}; expected {shapes[1]}")
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise ValueError(f"params[{name!r}] has dtype {value.dtype}; expected floating point")
        return tree


def flatten(params: Any) -> Params:
    """A tree as a flat dict: nested names are joined by dots, NNX variables give their arrays."""
    if not isinstance(params, Mapping):
        raise ValueError(f"params is a {type(params).__name__}; accepted: a dict from names to arrays, or an nnx.State")
    flat: Params = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": array for inner, array in flatten(value).items()}
        else:
            flat[str(name)] = value[...] if isinstance(value, nnx.Variable) else value
    return flat


def _on(device: Any, value: Any) -> jax.Array:
    """The array itself if it is there."""
    if isinstance(value, jax.Array) and value.devices() == {device}:
        return value
    return jax.device_put(value, device)
