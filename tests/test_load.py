"""What loading refuses, and that it names what is wrong."""

import json
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from helpers import TINY, load_tiny
from safetensors.numpy import load_file, save_file

from pagedjax.models.llama import Llama
from pagedjax.models.load import dummy_params, hf_shapes, load_params, open_checkpoint, read_config


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(TINY / "gqa", tmp_path / "model")
    return tmp_path / "model"


def load(folder):
    checkpoint, _ = open_checkpoint(str(folder))
    model = Llama(read_config(checkpoint))
    return load_params(model, checkpoint.tensors())


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def test_a_missing_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.pop(K_PROJ))
    with pytest.raises(ValueError, match=f"lacks 1 tensors, '{K_PROJ}' the first"):
        load(folder)


def test_an_unexpected_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.update({"model.layers.7.extra": np.zeros(3, np.float32)}))
    with pytest.raises(ValueError, match=r"'model.layers.7.extra' is not part of this LLaMA"):
        load(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    change(folder, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ][:-1].copy()}))
    with pytest.raises(ValueError, match=rf"'{K_PROJ}' has shape \[15, 32\]; expected \[16, 32\]"):
        load(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors' is not a whole safetensors file"):
        load(folder)


def test_pickle_files_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"only pickle files, which can run code and are refused: \['pytorch_model.bin'"
    ):
        load(folder)


def test_an_index_that_points_outside_the_folder_is_refused(folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ValueError, match=r"model.safetensors.index.json names 'other.safetensors', which is not in"):
        load(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("empty", "holds no model: there is no config.json"),
        ("missing.gguf", "does not exist"),
        ("a/b/c", "is neither an existing folder, a .gguf file nor a hub id"),
    ],
)
def test_a_path_without_a_model_is_refused(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        open_checkpoint(path)


def test_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json' is not valid JSON"):
        load(folder)


def test_generation_config_names_the_end_of_sequence_ids(folder):
    checkpoint, _ = open_checkpoint(str(folder))
    assert read_config(checkpoint).eos_token_ids == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_config(checkpoint).eos_token_ids == (7, 9)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_take_the_dtype_asked_for(folder, fused):
    checkpoint, _ = open_checkpoint(str(folder))
    model = Llama(read_config(checkpoint), fused=fused, dtype=ml_dtypes.bfloat16)
    params = load_params(model, checkpoint.tensors())
    assert {name: (p.shape, p.dtype) for name, p in params.items()} == {
        name: (s.shape, s.dtype) for name, s in model.shapes.items()
    }
    _, exact = load_tiny("gqa", fused)
    for name, value in params.items():
        np.testing.assert_array_equal(value, exact[name].astype(ml_dtypes.bfloat16))


def test_tensors_are_read_one_at_a_time(folder, monkeypatch):
    """The host never holds two: each is on the device before the next is read."""
    checkpoint, _ = open_checkpoint(str(folder))
    model = Llama(read_config(checkpoint))
    placed: list[str] = []

    def tensors():
        for i, item in enumerate(checkpoint.tensors()):
            assert len(placed) == i
            yield item

    from pagedjax.models import load as module

    place = module._place
    monkeypatch.setattr(module, "_place", lambda *a, **k: (placed.append(""), place(*a, **k))[1])
    load_params(model, tensors())
    assert len(placed) == len(model.shapes)


def test_dummy_weights_are_random_and_follow_the_seed():
    model, _ = load_tiny("gqa", True)
    first, again, other = (dummy_params(model, seed) for seed in (0, 0, 1))
    for name, spec in model.shapes.items():
        assert first[name].shape == spec.shape and first[name].dtype == spec.dtype
        np.testing.assert_array_equal(first[name], again[name])
        if not name.endswith("norm.weight"):
            assert (first[name] != other[name]).any()
            assert float(first[name].std()) == pytest.approx(model.config.initializer_range, rel=0.2)


@pytest.mark.parametrize("fused", [False, True])
def test_host_memory_peaks_at_a_small_multiple_of_the_largest_tensor(tmp_path, fused):
    """Python's and numpy's allocations, which are the host's share; JAX's own buffers are the device's."""
    config = json.loads((TINY / "gqa" / "config.json").read_text())
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes | {"num_attention_heads": 8, "head_dim": 64}))
    checkpoint, _ = open_checkpoint(str(tmp_path))
    model = Llama(read_config(checkpoint), fused=fused)
    tensors = {name: np.ones(shape, np.float32) for name, shape in hf_shapes(model.config).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    largest, total = max(t.nbytes for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    del tensors
    load_params(model, checkpoint.tensors())  # compiles
    tracemalloc.start()
    load_params(model, checkpoint.tensors())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 7 * largest
    assert peak < 2.5 * largest  # one on its way to the device, one being read
