"""models/gguf.py against small files written here the way llama.cpp's converter writes them."""

import gguf
import numpy as np
import pytest
from gguf_helpers import (
    HEAD_DIM,
    HIDDEN,
    KV_HEADS,
    LAYER_PARTS,
    LAYERS,
    Q_HEADS,
    VOCAB,
    llama_tensors,
    permuted,
    random,
    write,
)

from pagedjax.demo import demo_model_path
from pagedjax.models.gguf import GGUFFile


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


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_plain_floats_are_views_of_the_file(tmp_path, dtype):
    values = random(VOCAB, HIDDEN).astype(dtype)
    [(name, array)] = GGUFFile(write(tmp_path / "m.gguf", {"token_embd.weight": values})).tensors()
    assert name == "model.embed_tokens.weight" and array.dtype == dtype
    assert not array.flags.owndata and not array.flags.writeable
    np.testing.assert_array_equal(array, values)


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
