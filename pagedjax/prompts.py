"""What users may give as prompts, and what it becomes: text and token ids. No jax here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

from .detokenizer import Detokenizer
from .sampling_params import SamplingParams
from .tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A prompt that the chat template has yet to make."""

    messages: Sequence[Message]
    add_generation_prompt: bool
    tools: Sequence[Mapping[str, Any]] | None = None
    template: str | None = None  # instead of the model's own


class ReadPrompt(NamedTuple):
    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None


def read_prompt(prompt: Any, get_tokenizer: Callable[[], Tokenizer]) -> ReadPrompt:
    """Of a string, a list of ids, a dict or a conversation; ValueError on anything else."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if isinstance(prompt, Conversation):
        prompt = chat_prompt(prompt, get_tokenizer())
    if not isinstance(prompt, Mapping):
        if not hasattr(prompt, "__iter__"):
            raise ValueError(f"a prompt is a {type(prompt).__name__}; accepted: a string, a list of ids, or a dict")
        return ReadPrompt(None, list(prompt))
    unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
    if unknown or not set(prompt) - {"cache_salt"}:
        raise ValueError(f"a prompt has fields {sorted(prompt)}; accepted: prompt, prompt_token_ids, cache_salt")
    salt = prompt.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise ValueError(f"cache_salt={salt!r}; accepted: a string that is not empty, or None")
    if "prompt_token_ids" in prompt:
        return ReadPrompt(prompt.get("prompt"), list(prompt["prompt_token_ids"]), salt)
    text = prompt["prompt"]
    if not isinstance(text, str):
        raise ValueError(f"prompt is a {type(text).__name__}; expected a string")
    if not text:
        raise ValueError("prompt is empty; expected at least one token")
    return ReadPrompt(text, get_tokenizer().encode(text), salt)


def chat_prompt(conversation: Conversation, tokenizer: Tokenizer) -> dict[str, Any]:
    """The prompt that the model's chat template makes of a conversation."""
    more = {"tools": conversation.tools, "chat_template": conversation.template}
    given = {name: value for name, value in more.items() if value is not None}
    messages = list(conversation.messages)
    ids = tokenizer.apply_chat_template(messages, conversation.add_generation_prompt, **given)
    return {"prompt": tokenizer.decode(ids, skip_special_tokens=False), "prompt_token_ids": ids}


def bad_word_ids(words: Sequence[str], get_tokenizer: Callable[[], Tokenizer]) -> list[list[int]]:
    """Token sequences of the bad words, at the start of a word and within one."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            found[tuple(get_tokenizer().encode(text, add_special_tokens=False))] = None
    return [list(ids) for ids in found if ids]


def is_prompt(value: Any) -> bool:
    """Whether this is one prompt rather than a sequence of them."""
    if isinstance(value, str | Mapping | Conversation):
        return True
    return len(value) > 0 and all(isinstance(item, Integral) for item in value)


def priorities_of(priority: Any, count: int) -> list[int]:
    """One for each prompt; ValueError unless these are integers, and as many."""
    if priority is None:
        return [0] * count
    if not all(isinstance(rank, Integral) for rank in priority) or len(priority) != count:
        raise ValueError(f"priority={priority!r:.200}; accepted: an integer for each of the {count} prompts, or None")
    return [int(rank) for rank in priority]


def params_of(params: Any, count: int, default: SamplingParams) -> list[SamplingParams]:
    """One for each prompt; ValueError unless it is None, one for all, or as many."""
    if params is None or isinstance(params, SamplingParams):
        return [params or default] * count
    if not all(isinstance(each, SamplingParams) for each in params):
        raise ValueError(f"sampling_params={params!r:.200}; accepted: SamplingParams, a list of them, or None")
    if len(params) != count:
        raise ValueError(f"sampling_params has {len(params)} entries for {count} prompts; expected as many")
    return list(params)


def make_detokenizer(tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams) -> Detokenizer:
    """Of one output of the prompt."""
    return Detokenizer(
        tokenizer,
        prompt_token_ids,
        skip_special_tokens=params.skip_special_tokens,
        spaces_between_special_tokens=params.spaces_between_special_tokens,
        stop=params.stop_strings,
        include_stop_str_in_output=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )
