"""Text to token ids and back: encoding, chat templates, decoding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

if TYPE_CHECKING:  # it takes seconds to import, and whoever has token ids does not need it
    from transformers import PreTrainedTokenizerFast

from pagedjax.gguf_tokenizer import build_tokenizer
from pagedjax.models.gguf import GGUFFile


class Tokenizer:
    """A transformers fast tokenizer with the operations that serving needs; it never truncates or pads."""

    def __init__(self, hf: "PreTrainedTokenizerFast") -> None:
        self.hf: Any = hf  # its annotations are wider than what it returns
        self.backend: tokenizers.Tokenizer = hf.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        self.added_tokens = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.context_ids: list[int] = self.backend.encode("a", add_special_tokens=False).ids
        self._context_text = self.backend.decode(self.context_ids, skip_special_tokens=False)

    @classmethod
    def load(cls, model: str | Path) -> "Tokenizer":
        """The tokenizer of a GGUF file, of a folder with a tokenizer.json, or of a Hugging Face hub id.

        Raises FileNotFoundError for a GGUF file that is not there, and ValueError where no fast tokenizer can
        be had. Code that a checkpoint brings along is never run.
        """
        if Path(model).suffix == ".gguf":
            return cls(build_tokenizer(GGUFFile(model).tokenizer_metadata()))
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
        except Exception as error:  # transformers and tokenizers raise all kinds
            raise ValueError(f"model={str(model)!r}: no tokenizer could be loaded: {error}") from error
        if not hf.is_fast:
            found = type(hf).__name__
            raise ValueError(f"model={str(model)!r} has a {found}, expected one with a tokenizer.json")
        return cls(hf)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; tokens such as BOS come with it where the model wants them."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # also for half a surrogate pair, which is str but not Unicode text
            raise ValueError(f"text={text!r:.100}, expected a str of valid Unicode") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids beyond the vocabulary, which padded models can sample, have none."""
        try:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise ValueError(f"token ids {list(ids)!s:.100}, expected integers from 0 to 2**32 - 1") from error

    def decode_within(self, ids: Sequence[int]) -> str:
        """The text of token ids as they read inside a text, a leading space and special tokens included."""
        text = self.decode([*self.context_ids, *ids], skip_special_tokens=False)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self.decode(ids, skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The text of one token; U+FFFD stands for bytes that are no character by themselves."""
        return self.decode_within([token_id])

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Token ids of a conversation; `kwargs` reach the model's template (or replace it: `chat_template`).

        Raises ValueError for a model without a template, for a message without role and content, and with the
        template's own words where it refuses the conversation.
        """
        if self.hf.chat_template is None and kwargs.get("chat_template") is None:
            raise ValueError("the model has no chat template; complete a plain prompt, or give chat_template")
        _check_messages(messages)
        try:
            ids = self.hf.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, return_dict=False, **kwargs
            )
        except Exception as error:  # a template is a program of someone else's
            raise ValueError(f"the chat template does not take these messages: {error}") from error
        return list(ids)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.hf)

    @property
    def eos_token_id(self) -> int | None:
        return self.hf.eos_token_id

    @property
    def bos_token_id(self) -> int | None:
        return self.hf.bos_token_id


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    is_list = isinstance(messages, list | tuple) and len(messages) > 0
    if not is_list:
        raise ValueError(f"messages={messages!r:.100}, expected a list of at least one message")
    for i, message in enumerate(messages):
        has_role = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not has_role:
            raise ValueError(f"messages[{i}]={message!r:.100}, expected a dict with a role and content")
        content = message.get("content")
        has_content = isinstance(content, str | list | None)
        if not has_content:
            raise ValueError(f"messages[{i}]['content']={content!r:.100}, expected text or a list of parts")
