"""The tokenizer that a GGUF file describes, built with the tokenizers library.

Two families exist. "gpt2" is byte-level BPE: merges in order, after the text was split by the patterns that
`tokenizer.ggml.pre` names. "llama" is SentencePiece BPE: no splitting, spaces written as U+2581, the pair
whose union scores highest merged first, and bytes for what the vocabulary lacks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:  # it takes seconds to import
    from transformers import PreTrainedTokenizerFast

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # token_type; 5 is unused, 6 a byte
_SPACE = "\u2581"
_SPECIAL_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_SENTENCE_PIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # its usual ones, which a file may leave out

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Split:
    """What comes before the merges: each pattern in turn cuts the pieces left by the one before it."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is itself a token is taken whole
    add_bos: bool = False  # when the file does not say
    nfc: bool = False


_DIGITS_APART = _Split((r"\p{N}", _GPT2))
_LLAMA3_SPLIT = _Split((_LLAMA3,), ignore_merges=True, add_bos=True)
_SPLITS = {
    "gpt-2": _Split((_GPT2,)),
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "qwen2": _Split((_LLAMA3.replace("{1,3}", ""),), nfc=True),
    "tekken": _Split((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": _Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    """The tokenizer of the `tokenizer.*` fields, with its special tokens and chat template.

    Raises ValueError, naming the field, for a model or pre-tokeniser that is not known and for fields that
    contradict one another.
    """
    from transformers import PreTrainedTokenizerFast

    kind = _field(metadata, "model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model={kind!r}, expected 'gpt2' or 'llama'")
    tokens, types = _tokens_and_types(metadata)
    special = _special_tokens(metadata, tokens, _SENTENCE_PIECE_IDS if kind == "llama" else {})
    if kind == "gpt2":
        split = _split(metadata)
        backend, add_bos = _byte_level(metadata, tokens, split), split.add_bos
    else:
        backend, add_bos = _sentence_piece(metadata, tokens, types, special["unk_token"]), True
    _add_tokens(backend, tokens, types)
    _frame(backend, metadata, special, add_bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], split: _Split) -> Tokenizer:
    """Byte-level BPE. This family has no use for `add_space_prefix`, which some of its files carry."""
    merges = []
    for merge in _field(metadata, "merges"):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"tokenizer.ggml.merges has {merge!r}, expected two tokens and one space")
        merges.append((left, right))
    backend = Tokenizer(_bpe(tokens, merges, ignore_merges=split.ignore_merges))
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_piece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], unknown: str
) -> Tokenizer:
    """SentencePiece BPE. `add_space_prefix` puts a space before all text, also after a special token."""
    merges = _merges_by_score(tokens, types, _per_token(metadata, "scores", len(tokens)))
    backend = Tokenizer(_bpe(tokens, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    add_space_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_by_score(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to split a token into two tokens, the best scored union first.

    Only normal tokens take part: control, byte and unknown tokens cannot be spelled out in text.
    """
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL}
    merges = []
    for token in sorted(ids, key=lambda token: -scores[ids[token]]):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += sorted((h for h in halves if h[0] in ids and h[1] in ids), key=lambda h: (ids[h[0]], ids[h[1]]))
    return merges


def _bpe(tokens: Sequence[str], merges: Sequence[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **options)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"tokenizer.ggml.tokens and tokenizer.ggml.merges do not fit: {error}") from error


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Have control and user-defined tokens found in text as they stand; decoding can skip control tokens."""
    control = [token for token, kind in zip(tokens, types, strict=True) if kind in (_UNKNOWN, _CONTROL)]
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False) for token in user_defined])


def _frame(backend: Tokenizer, metadata: Mapping[str, Any], special: Mapping[str, str], add_bos: bool) -> None:
    """Put the BOS and EOS tokens that the file asks for around every encoded text."""
    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    for name, is_wanted in wanted.items():
        if is_wanted and f"{name}_token" not in special:
            raise ValueError(f"tokenizer.ggml.add_{name}_token is true, but tokenizer.ggml.{name}_token_id is missing")
    before = [special["bos_token"]] if wanted["bos"] else []
    after = [special["eos_token"]] if wanted["eos"] else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, backend.token_to_id(token)) for token in before + after],
    )


def _special_tokens(
    metadata: Mapping[str, Any], tokens: Sequence[str], default_ids: Mapping[str, int]
) -> dict[str, str]:
    """The named tokens that the file has, by transformers' names for them."""
    special = {}
    for field, name in _SPECIAL_NAMES.items():
        token_id = metadata.get(f"tokenizer.ggml.{field}_token_id", default_ids.get(field))
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise ValueError(f"tokenizer.ggml.{field}_token_id={token_id}, expected an id below {len(tokens)}")
        special[name] = tokens[token_id]
    return special


def _split(metadata: Mapping[str, Any]) -> _Split:
    name = _field(metadata, "pre")
    if name not in _SPLITS:
        raise ValueError(f"tokenizer.ggml.pre={name!r} is not known, expected one of {sorted(_SPLITS)}")
    return _SPLITS[name]


def _tokens_and_types(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = _field(metadata, "tokens")
    first: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if first.setdefault(token, i) != i:
            raise ValueError(f"tokenizer.ggml.tokens has {token!r} twice, at {first[token]} and {i}")
    return tokens, _per_token(metadata, "token_type", len(tokens))


def _per_token(metadata: Mapping[str, Any], name: str, num_tokens: int) -> list[Any]:
    if len(values := _field(metadata, name)) != num_tokens:
        raise ValueError(
            f"tokenizer.ggml.{name} has {len(values)} values, expected one for each of {num_tokens} tokens"
        )
    return values


def _field(metadata: Mapping[str, Any], name: str) -> Any:
    if (key := f"tokenizer.ggml.{name}") not in metadata:
        raise ValueError(f"field {key!r} is missing")
    return metadata[key]
