"""What an engine can never run is refused where it enters: ValueErrors name field, value and what is accepted."""

import operator
import reprlib
from collections.abc import Iterable, Sequence

from .adjustments import MAX_BAD_WORD_TOKENS, MAX_BANS, ban_entries
from .request import Request
from .sampling_params import SamplingParams


def check_prompt(prompt_token_ids: Sequence[int], max_model_len: int, vocab_size: int) -> list[int]:
    """The prompt as a list of integers."""
    try:
        prompt = [operator.index(token) for token in prompt_token_ids]
    except TypeError as error:
        raise ValueError(f"prompt_token_ids={reprlib.repr(prompt_token_ids)}; accepted: integers") from error
    if not prompt:
        raise ValueError("prompt_token_ids is empty; expected at least one token")
    if len(prompt) >= max_model_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens; accepted: fewer than max_model_len={max_model_len}")
    _check_ids("prompt_token_ids", prompt, vocab_size)
    return prompt


def check_params(params: SamplingParams, vocab_size: int, max_logprobs: int) -> None:
    """Ids within the vocabulary, and no more logprobs than the engine's `max_logprobs`."""
    _check_ids("stop_token_ids", params.stop_token_ids or (), vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_ids("logit_bias", params.logit_bias or (), vocab_size)
    cap = vocab_size if max_logprobs == -1 else max_logprobs
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and (vocab_size if value == -1 else value) > cap:
            raise ValueError(f"{name}={value}; accepted: at most max_logprobs={max_logprobs}")


def check_request(request: Request) -> None:
    """No more bans than a row of the device holds, and a token that may be sampled."""
    _check_bans(request)
    _check_allowed(request)


def _check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} has token id {token}; accepted: 0 to {vocab_size - 1}")


def _check_allowed(request: Request) -> None:
    """At least one allowed token must be left at the start, or nothing could be sampled."""
    allowed = request.params.allowed_token_ids
    banned = {*request.banned_until, *(words[0] for words in request.bad_words if len(words) == 1)}
    if allowed is not None and not set(allowed) - banned:
        raise ValueError(
            f"allowed_token_ids={list(allowed)} are all excluded by bad_words, "
            f"or by min_tokens={request.params.min_tokens}"
        )


def _check_bans(request: Request) -> None:
    bans = ban_entries(request)
    if len(bans) > MAX_BANS:
        raise ValueError(
            f"bad_words of several tokens, and with min_tokens the end and stop ids, make {len(bans)} bans; "
            f"accepted: at most {MAX_BANS}"
        )
    longest = max((len(words) for words, _ in bans), default=0)
    if longest > MAX_BAD_WORD_TOKENS:
        raise ValueError(f"bad_words has a word of {longest} tokens; accepted: at most {MAX_BAD_WORD_TOKENS}")
