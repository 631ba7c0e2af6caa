"""models/gguf.py against small files written here the way llama.cpp's converter writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from pagedjax.demo import demo_model_path
from pagedjax.models.gguf import GGUFFile

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


def test_config_of_the_demo_model_is_what_hugging_face_publishes():
    assert GGUFFile(demo_model_path()).config() == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "silu",
        "rms_norm_eps": float(np.float32(1e-5)),
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_defaults_fill_in_for_fields_that_a_file_may_lack(tmp_path):
    names = ("llama.attention.head_count_kv", "llama.rope.freq_base")
    ids = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")
    config = GGUFFile(write(tmp_path / "m.gguf", fields=dict.fromkeys(names + ids))).config()
    assert config["num_key_value_heads"] == Q_HEADS
    assert config["rope_theta"] == 10000.0
    assert config["head_dim"] == HIDDEN // Q_HEADS
    assert config["bos_token_id"] is None and config["eos_token_id"] is None


def test_key_length_wins_over_the_quotient_as_head_size(tmp_path):
    sizes = {"llama.attention.key_length": 32, "llama.attention.value_length": 32, "llama.rope.dimension_count": 32}
    assert GGUFFile(write(tmp_path / "m.gguf", fields=sizes)).config()["head_dim"] == 32


def test_ids_that_end_turns_and_messages_end_sequences_too(tmp_path):
    ends = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 1}
    assert GGUFFile(write(tmp_path / "m.gguf", fields=ends)).config()["eos_token_id"] == [1, 3]


def test_head_and_biases_are_read_off_the_tensors(tmp_path):
    tensors = llama_tensors() | {
        "output.weight": random(VOCAB, HIDDEN),
        "blk.1.attn_v.bias": random(KV_HEADS * HEAD_DIM),
    }
    config = GGUFFile(write(tmp_path / "m.gguf", tensors)).config()
    assert not config["tie_word_embeddings"]
    assert config["attention_bias"] and not config["mlp_bias"]


def test_linear_rope_scaling_keeps_its_factor(tmp_path):
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert GGUFFile(write(tmp_path / "m.gguf", fields=scaling)).config()["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 4.0,
    }
    none = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    assert GGUFFile(write(tmp_path / "n.gguf", fields=none)).config()["rope_scaling"] is None


def test_rope_factors_are_config_and_not_a_weight(tmp_path):
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    file = GGUFFile(write(tmp_path / "m.gguf", llama_tensors() | {"rope_freqs.weight": factors}))
    assert file.config()["rope_scaling"] == {"rope_type": "freq_factors", "freq_factors": factors.tolist()}
    assert not any("rope" in name for name, _ in file.tensors())


def test_rope_factors_of_another_head_size_are_refused(tmp_path):
    file = GGUFFile(write(tmp_path / "m.gguf", llama_tensors() | {"rope_freqs.weight": random(HEAD_DIM)}))
    with pytest.raises(ValueError, match=r"rope_freqs.weight has 16 values, expected 8"):
        file.config()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"split.count": 3}, "split.count=3"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
        ({"llama.attention.head_count_kv": [2, 4]}, r"llama.attention.head_count_kv=\[2, 4\]"),
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
        ({"llama.block_count": 0}, "llama.block_count=0, expected one positive integer"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8, expected the head size, 16"),
    ],
)
def test_a_model_that_is_no_plain_llama_is_refused_by_field(tmp_path, fields, message):
    path = write(tmp_path / "m.gguf", fields=fields)
    with pytest.raises(ValueError, match=message) as error:
        GGUFFile(path).config()
    assert str(path) in str(error.value)


def test_another_architecture_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"m\.gguf: general.architecture='qwen2', expected 'llama'"):
        GGUFFile(write(tmp_path / "m.gguf", architecture="qwen2"))


def test_every_tensor_gets_its_hugging_face_name_and_shape(tmp_path):
    tensors = llama_tensors() | {"output.weight": random(VOCAB, HIDDEN)}
    expected = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        expected |= {f"model.layers.{layer}.{name}.weight": shape for _, name, shape in LAYER_PARTS}
    read = dict(GGUFFile(write(tmp_path / "m.gguf", tensors)).tensors())
    assert {name: array.shape for name, array in read.items()} == expected
    np.testing.assert_array_equal(read["lm_head.weight"], tensors["output.weight"])
    np.testing.assert_array_equal(read["model.layers.1.mlp.down_proj.weight"], tensors["blk.1.ffn_down.weight"])


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_rows_of_q_and_k_return_to_hugging_face_order(tmp_path, num_kv_heads):
    q, k, v = (random(n * HEAD_DIM, HIDDEN) for n in (Q_HEADS, num_kv_heads, num_kv_heads))
    q_bias, k_bias = random(Q_HEADS * HEAD_DIM), random(num_kv_heads * HEAD_DIM)
    tensors = {
        "blk.0.attn_q.weight": permuted(q, Q_HEADS),
        "blk.0.attn_k.weight": permuted(k, num_kv_heads),
        "blk.0.attn_v.weight": v,
        "blk.0.attn_q.bias": permuted(q_bias, Q_HEADS),
        "blk.0.attn_k.bias": permuted(k_bias, num_kv_heads),
    }
    path = write(tmp_path / "m.gguf", tensors, {"llama.attention.head_count_kv": num_kv_heads})
    read = dict(GGUFFile(path).tensors())
    for name, expected in {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v}.items():
        np.testing.assert_array_equal(read[f"model.layers.0.self_attn.{name}"], expected, err_msg=name)
    for name, expected in {"q_proj.bias": q_bias, "k_proj.bias": k_bias}.items():
        np.testing.assert_array_equal(read[f"model.layers.0.self_attn.{name}"], expected, err_msg=name)


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


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_plain_floats_are_views_of_the_file(tmp_path, dtype):
    values = random(VOCAB, HIDDEN).astype(dtype)
    [(name, array)] = GGUFFile(write(tmp_path / "m.gguf", {"token_embd.weight": values})).tensors()
    assert name == "model.embed_tokens.weight" and array.dtype == dtype
    assert not array.flags.owndata and not array.flags.writeable
    np.testing.assert_array_equal(array, values)


def test_a_quantised_projection_is_reordered_after_it_is_dequantised(tmp_path):
    q = random(Q_HEADS * HEAD_DIM, HIDDEN)
    blocks = gguf.quants.quantize(permuted(q, Q_HEADS), Type.Q8_0)
    path = write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (blocks, Type.Q8_0)})
    [(_, array)] = GGUFFile(path).tensors()
    np.testing.assert_allclose(array, q, atol=np.abs(q).max() / 127)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_qkv.weight", "blk.2.attn_q.weight", "blk.0.attn_norm.bias", "blk.0.ffn_up.scale", "extra"]
)
def test_a_tensor_that_no_llama_has_is_named(tmp_path, name):
    file = GGUFFile(write(tmp_path / "m.gguf", llama_tensors() | {name: random(HIDDEN)}))
    with pytest.raises(ValueError, match=f"tensor '{name}' is not one of a LLaMA's"):
        next(file.tensors())


def test_a_type_that_gguf_cannot_dequantise_is_named(tmp_path):
    path = write(tmp_path / "m.gguf", {"output_norm.weight": np.arange(HIDDEN, dtype=np.int16)})
    with pytest.raises(ValueError, match=r"tensor 'output_norm.weight' has type I16"):
        list(GGUFFile(path).tensors())


def test_a_file_cut_short_anywhere_is_refused_by_name(tmp_path):
    whole = write(tmp_path / "m.gguf", {"output_norm.weight": random(32)}).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(1, len(whole), 5):
        path.write_bytes(whole[:length])
        message = rf"cut\.gguf: not a complete GGUF file: it is {length} bytes long, but its contents reach to byte \d+"
        with pytest.raises(ValueError, match=message):
            GGUFFile(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cut\.gguf: not a complete GGUF file"):
        GGUFFile(path)
    path.write_bytes(whole)
    assert [array.size for _, array in GGUFFile(path).tensors()] == [32]


def test_a_length_beyond_the_file_is_refused(tmp_path):
    whole = bytearray(write(tmp_path / "m.gguf", {"output_norm.weight": random(32)}).read_bytes())
    key = b"tokenizer.ggml.tokens"
    at = whole.index(key) + len(key) + 8  # past the types of the field and of its elements
    assert int.from_bytes(whole[at : at + 8], "little") == 4
    whole[at - 4 : at + 8] = (0).to_bytes(4, "little") + (2**18).to_bytes(8, "little")  # that many uint8
    (tmp_path / "huge.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match=r"huge\.gguf: not a complete GGUF file: it is \d+ bytes long"):
        GGUFFile(tmp_path / "huge.gguf")


def test_another_file_format_is_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(4096))
    with pytest.raises(ValueError, match=r"model\.gguf: not a complete GGUF file: GGUF magic invalid"):
        GGUFFile(path)


def test_a_file_of_the_other_byte_order_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"big\.gguf: big-endian, but this machine is little-endian"):
        GGUFFile(tmp_path / "big.gguf")


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        GGUFFile(tmp_path / "none.gguf")


def test_tokenizer_fields_come_as_python_values_under_their_names(tmp_path):
    path = write(tmp_path / "m.gguf", fields={"tokenizer.chat_template": "{{ x }}"})
    assert GGUFFile(path).tokenizer_metadata() == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "é"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ x }}",
    }


def test_a_missing_demo_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"uv run --extra demo"):
        demo_model_path()
