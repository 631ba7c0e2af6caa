"""Hugging Face checkpoints: a folder of config.json and safetensors files, local or on the hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class SafetensorsFolder:
    """A checkpoint folder. `config()` and `tensors()` are all that loading needs (`models.gguf` has the same two)."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            raise ValueError(f"model={str(path)!r} holds no model: there is no config.json in it")

    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    def generation_config(self) -> dict[str, Any]:
        """The model's own sampling defaults and end-of-sequence ids; empty if it has none."""
        path = self.path / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    def files(self) -> list[Path]:
        """The safetensors files that hold the weights, shards in the index's order."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = dict.fromkeys(read_json(index).get("weight_map", {}).values())
            files = [self.path / name for name in names]
        elif (self.path / "model.safetensors").is_file():
            files = [self.path / "model.safetensors"]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            pickles = [file.name for pattern in PICKLES for file in self.path.glob(pattern)]
            reason = f"only pickle files, which can run code and are refused: {pickles}" if pickles else "no weights"
            raise ValueError(f"model={str(self.path)!r} holds {reason}; accepted: *.safetensors")
        for file in files:
            if file.parent.resolve() != self.path.resolve() or not file.is_file():
                raise ValueError(f"{index.name} names {file.name!r}, which is not in {str(self.path)!r}")
        return files

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by its name, one at a time, as memory-mapped views."""
        for file in self.files():
            try:
                with safe_open(file, framework="numpy") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dict)
                        yield name, tensors.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{str(file)!r} is not a whole safetensors file: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; ValueError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds a {type(value).__name__}; expected an object")
    return value
