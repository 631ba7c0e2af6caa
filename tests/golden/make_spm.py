"""Make spm.json: a tiny SentencePiece BPE vocabulary and what SentencePiece itself makes of some texts.

Run with `pip install sentencepiece protobuf` from this folder: python make_spm.py
"""

import io
import json
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

CORPUS = """The quick brown fox jumps over the lazy dog, and the dog does not mind the quick fox at all.
A page is a fixed run of token slots; a sequence holds as many pages as its tokens need, and gives them back.
When the pool is empty, the newest request is preempted, its pages are freed, and it is computed again later.
Numbers such as 0, 1, 2, 3, 12, 123, 2024 and 65536 are split into digits. Is that so? Yes: it is so!
def encode(text):\n    return [token for token in text if token != ""]\n\tprint(encode("abc"))
banana ananas bananarama abababab cabababac aaaaaaaa abcabcabc xyzzy xyzxyz
Größe, Straße, naïve café, señor, Ελλάδα, Москва, こんにちは世界。
"""
TEXTS = [
    "The quick brown fox", "the", " the", "  the", "the ", "", " ", "   ", "a  b   c    d", "Hello, world!\n",
    "\n\n\tindented\n", "banana ananas", "abababab", "aaaaaaa", "bananarama cabababac xyzxyzzy",
    "in 2024, 65536 pages", "Größe naïve café", "Москва Ελλάδα", "こんにちは世界",
    "emoji \U0001f600\U0001f469\u200d\U0001f467 and Thai สวัสดี", "ne\u0301e", "\u2581literal\u2581",
    "<0x41> is not a byte", "one<sep>two", "<sep>", "one <sep> two <sep><sep>", "x\u00a0y\u3000z",
    "def f(x):\n    return x\n",
]  # fmt: skip


def train() -> sentencepiece_model_pb2.ModelProto:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=560,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        control_symbols=["<|turn|>"],
        user_defined_symbols=["<sep>"],
        minloglevel=2,
    )
    return sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())


def encode_all(model: sentencepiece_model_pb2.ModelProto, add_space_prefix: bool) -> list[dict]:
    model.normalizer_spec.add_dummy_prefix = add_space_prefix
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return [{"text": text, "ids": (ids := processor.encode(text)), "decoded": processor.decode(ids)} for text in TEXTS]


def main() -> None:
    model = train()
    golden = {
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [piece.type for piece in model.pieces],
        "with_space_prefix": encode_all(model, True),
        "without_space_prefix": encode_all(model, False),
    }
    path = Path(__file__).with_name("spm.json")
    path.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
