"""A byte-level tokenizer and a SentencePiece one with byte fallback, for tests of encoding and decoding."""

import json
from pathlib import Path

from pagedjax.demo import demo_model_path
from pagedjax.gguf_tokenizer import build_tokenizer
from pagedjax.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
TEXT = "héllo 世界 😀👩‍👩‍👧  \n\n\tx=1 2024 café "


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.load(demo_model_path())


def spm_tokenizer() -> Tokenizer:
    """SentencePiece with a space prefix: <s> 1, </s> 2, control token <|turn|> 3, user-defined <sep> 4."""
    golden = json.loads((GOLDEN / "spm.json").read_text(encoding="utf-8"))
    fields = {name: golden[name] for name in ("tokens", "scores", "token_type")}
    return Tokenizer(build_tokenizer({f"tokenizer.ggml.{k}": v for k, v in ({"model": "llama"} | fields).items()}))
