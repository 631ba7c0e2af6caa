"""pagedjax/gguf_tokenizer.py: the demo model's byte-level BPE, small known vocabularies, and SentencePiece."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pagedjax.demo import demo_model_path
from pagedjax.gguf_tokenizer import build_tokenizer
from pagedjax.models.gguf import GGUFFile

GOLDEN = Path(__file__).parent / "golden"
SPM = json.loads((GOLDEN / "spm.json").read_text(encoding="utf-8"))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SAMPLES = [
    "Hello, world!",
    " leading and trailing ",
    "two  three   four    spaces",
    "\n\n\ttabs and\r\nnewlines\n",
    "def f(x):\n    return x**2 + 3.14159  # squared\n",
    "don't, we'll, I'VE, it's",
    "Größe naïve café — “quotes” … ½ ²",
    "こんにちは世界。Привет, мир! مرحبا ١٢٣",
    "emoji 😀 family 👩‍👩‍👧 flag 🇫🇷 e\u0301",
    "1234567890 1,000.00 x2024y",
    "<|im_start|",
    "a",
    "",
]


def spm_metadata(**fields: Any) -> dict[str, Any]:
    """The tiny SentencePiece vocabulary as a GGUF file would hold it."""
    metadata = {
        "model": "llama",
        "tokens": SPM["tokens"],
        "scores": SPM["scores"],
        "token_type": SPM["token_type"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (metadata | fields).items() if value is not None}


def bpe_metadata(**fields: Any) -> dict[str, Any]:
    """A byte-level vocabulary: ASCII letters, a few merges, three control tokens and a user-defined one."""
    tokens = [*"abcdefgh", "Ġ", "ab", "abc", "fg", "<s>", "</s>", "<unk>", "<tool>"]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [NORMAL] * 12 + [CONTROL] * 3 + [USER_DEFINED],
        "merges": ["a b", "f g"],
        "bos_token_id": 12,
        "eos_token_id": 13,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (metadata | fields).items() if value is not None}


def texts_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str | None]:
    return [tokenizer.backend_tokenizer.id_to_token(token_id) for token_id in tokenizer.encode(text)]


@pytest.fixture(scope="module")
def demo() -> PreTrainedTokenizerFast:
    return build_tokenizer(GGUFFile(demo_model_path()).tokenizer_metadata())


@pytest.fixture(scope="module")
def spm() -> PreTrainedTokenizerFast:
    return build_tokenizer(spm_metadata())


def test_smollm_splits_digits_one_by_one_before_anything_else(demo):
    assert demo.encode("x  2024") == [104, 256, 34, 32, 34, 36]
    assert demo.encode("The capital of France is") == [504, 3575, 282, 4649, 314]


def test_demo_prompts_encode_to_the_golden_ids(demo):
    prompts = json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))["prompts"]
    assert {p["name"]: demo.encode(p["text"]) for p in prompts} == {p["name"]: p["prompt_ids"] for p in prompts}


@pytest.mark.parametrize("text", SAMPLES)
def test_byte_level_text_survives_a_round_trip(demo, text):
    assert demo.decode(demo.encode(text)) == text


# The vocabulary lacks six control characters and the first bytes of planes without characters.
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x2FFFF, exclude_categories=("Cs", "Cc"))))
def test_any_text_survives_a_round_trip(demo, text):
    assert demo.decode(demo.encode(text)) == text


def test_special_tokens_inside_text_are_single_ids_that_decoding_can_skip(demo):
    ids = demo.encode("<|im_start|>user\nhi<repo_name>\n")
    assert ids == [1, 4093, 198, 6004, 3, 198]
    assert demo.decode(ids) == "<|im_start|>user\nhi<repo_name>\n"
    assert demo.decode(ids, skip_special_tokens=True) == "user\nhi\n"


def test_names_template_and_sizes_come_from_the_file(demo):
    assert (demo.bos_token, demo.eos_token, demo.unk_token, demo.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_end|>",
    )
    assert len(demo) == 49152
    ids = demo.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False)
    assert demo.decode(ids).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'", "LL", " see", " 12345", "!$", "\n\n ", " okHi世", "'s"]),
        ("default", ["I", "'", "LL", " see", " ", "123", "45", "!$", "\n\n ", " okHi世", "'", "s"]),
        ("smollm", ["I", "'", "LL", " see", " ", *"12345", "!$", "\n\n ", " okHi世", "'s"]),
        ("starcoder", ["I", "'", "LL", " see", " ", *"12345", "!$", "\n\n ", " okHi世", "'s"]),
        ("refact", ["I", "'", "LL", " see", " ", *"12345", "!$", "\n\n ", " okHi世", "'s"]),
        ("llama-bpe", ["I", "'LL", " see", " ", "123", "45", "!$\n\n", " ", " okHi世", "'s"]),
        ("llama3", ["I", "'LL", " see", " ", "123", "45", "!$\n\n", " ", " okHi世", "'s"]),
        ("qwen2", ["I", "'LL", " see", " ", *"12345", "!$\n\n", " ", " okHi世", "'s"]),
        ("tekken", ["I", "'LL", " see", " ", *"12345", "!$\n\n", " ", " ok", "Hi世", "'s"]),
        ("deepseek-coder", ["I", "'", "LL", " see", " ", *"12345", "!", "$", *"\n\n", " ", " okHi", "世", "'", "s"]),
    ],
)
def test_each_pre_tokeniser_cuts_as_its_patterns_say(pre, pieces):
    text = "I'LL see 12345!$\n\n  okHi世's"
    backend = build_tokenizer(bpe_metadata(pre=pre)).backend_tokenizer
    assert [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_merges_apply_in_the_files_order():
    assert texts_of(build_tokenizer(bpe_metadata()), "abcfgh") == ["ab", "c", "fg", "h"]
    swapped = bpe_metadata(
        tokens=[*"abc", "ab", "bc"],
        token_type=[NORMAL] * 5,
        merges=["b c", "a b"],
        bos_token_id=None,
        eos_token_id=None,
    )
    assert texts_of(build_tokenizer(swapped), "abc") == ["a", "bc"]


def test_llama_bpe_takes_a_whole_word_that_no_merge_leads_to():
    assert texts_of(build_tokenizer(bpe_metadata(pre="llama-bpe", add_bos_token=False)), "abc abc") == [
        "abc",
        "Ġ",
        "ab",
        "c",
    ]
    assert texts_of(build_tokenizer(bpe_metadata(pre="gpt-2")), "abc") == ["ab", "c"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"pre": "gpt-2"}, ["a"]),
        ({"pre": "llama-bpe"}, ["<s>", "a"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["a"]),
        ({"pre": "gpt-2", "add_bos_token": True, "add_eos_token": True}, ["<s>", "a", "</s>"]),
    ],
)
def test_bos_and_eos_frame_text_where_the_file_or_its_family_says(fields, expected):
    tokenizer = build_tokenizer(bpe_metadata(**fields))
    assert texts_of(tokenizer, "a") == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [0]


def test_user_defined_tokens_are_found_in_text_and_kept_when_decoding():
    tokenizer = build_tokenizer(bpe_metadata())
    ids = tokenizer.encode("a<tool>b</s>")
    assert ids == [0, 15, 1, 13]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>b"


# After a user-defined token such as <sep>, GGUF's way puts a space where SentencePiece itself puts none.
@pytest.mark.parametrize(
    "case", [c for c in SPM["with_space_prefix"] if "<sep>" not in c["text"]], ids=lambda case: repr(case["text"])
)
def test_sentencepiece_text_encodes_and_decodes_as_sentencepiece_does(spm, case):
    assert spm.encode(case["text"]) == case["ids"]
    assert spm.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("case", SPM["without_space_prefix"], ids=lambda case: repr(case["text"]))
def test_sentencepiece_without_space_prefix_adds_none(case):
    tokenizer = build_tokenizer(spm_metadata(add_space_prefix=False))
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_sentencepiece_text_after_a_special_token_starts_with_a_space():
    tokenizer = build_tokenizer(spm_metadata())
    assert texts_of(tokenizer, "the</s>the<|turn|>the<sep>the") == [
        "▁the",
        "</s>",
        "▁the",
        "<|turn|>",
        "▁the",
        "<sep>",
        "▁the",
    ]


def test_sentencepiece_ids_that_a_file_leaves_out_are_the_usual_ones():
    absent = dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token"))
    tokenizer = build_tokenizer(spm_metadata(**absent))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert texts_of(tokenizer, "the") == ["<s>", "▁the"]


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_sentencepiece_through_its_bytes(spm, text):
    assert spm.decode(spm.encode(text)) == text.replace("▁", " ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model='t5', expected 'gpt2' or 'llama'"),
        ({"pre": "klingon"}, "tokenizer.ggml.pre='klingon' is not known, expected one of .*'llama-bpe'"),
        ({"pre": None}, "field 'tokenizer.ggml.pre' is missing"),
        ({"tokens": None}, "field 'tokenizer.ggml.tokens' is missing"),
        ({"token_type": [NORMAL]}, "tokenizer.ggml.token_type has 1 values, expected one for each of 16"),
        ({"merges": ["a b", "ab"]}, "tokenizer.ggml.merges has 'ab', expected two tokens"),
        ({"merges": ["a z"]}, "tokenizer.ggml.tokens and tokenizer.ggml.merges do not fit"),
        ({"bos_token_id": 16}, "tokenizer.ggml.bos_token_id=16, expected an id below 16"),
        ({"bos_token_id": None, "add_bos_token": True}, "add_bos_token is true, but tokenizer.ggml.bos_token_id"),
        ({"tokens": ["a"] * 16}, "tokenizer.ggml.tokens has 'a' twice, at 0 and 1"),
    ],
)
def test_metadata_that_makes_no_tokenizer_is_refused_by_field(fields, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(bpe_metadata(**fields))


def test_sentencepiece_needs_a_score_for_each_token():
    with pytest.raises(ValueError, match=r"tokenizer.ggml.scores has 2 values, expected one for each of 560 tokens"):
        build_tokenizer(spm_metadata(scores=[0.0, 1.0]))
