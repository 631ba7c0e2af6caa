"""Log-probabilities of a step that has been read back, kept with the requests they belong to."""

from collections.abc import Callable
from typing import Any

import jax

from .in_flight import PromptLogprobs
from .request import Logprob, Logprobs, Status
from .schedule import Schedule

TokenText = Callable[[int], str] | None


def keep_logprobs(schedule: Schedule, sampled: Any, token_text: TokenText) -> None:
    """Of the sampled tokens, which the requests do not have yet; `sampled` (`sampler.Sampled`) is on the host."""
    if sampled.logprobs is None and sampled.recorded is None:
        return
    for i, sequence in enumerate(schedule.sequences):
        request = sequence.request
        if not sequence.samples or request.status is Status.FINISHED:
            continue
        if request.recorded:
            request.recorded_logprobs.append(float(sampled.recorded[i]))
        wanted = request.params.logprobs
        if wanted is not None and request.search:
            tops = sampled.top_logprobs[i, :wanted].tolist(), sampled.top_tokens[i, :wanted].tolist()
            request.candidates = list(zip(*tops, strict=True))
        elif wanted is not None:
            request.logprobs.append(_logprobs(sampled, i, wanted, token_text))


def keep_prompt_logprobs(part: PromptLogprobs, token_text: TokenText) -> None:
    """Of prompt tokens; a preempted request computes some of them twice."""
    sampled = jax.device_get(part.sampled)
    collected = part.request.prompt_logprobs
    if not collected:
        collected.append(None)  # nothing predicts the first token
    for i in range(len(collected) - part.first, part.count):
        collected.append(_logprobs(sampled, i, part.request.params.prompt_logprobs or 0, token_text))


def _logprobs(sampled: Any, i: int, wanted: int, token_text: TokenText) -> Logprobs:
    """The sampled token of row i and the `wanted` likeliest (-1: all), likeliest first after the sampled one."""
    text = token_text or (lambda token: None)
    tops = sampled.top_tokens[i].tolist(), sampled.top_logprobs[i].tolist()
    count = len(tops[0]) if wanted == -1 else wanted
    token = int(sampled.tokens[i])
    found = {token: Logprob(float(sampled.logprobs[i]), int(sampled.ranks[i]), text(token))}
    for rank, (other, logprob) in enumerate(zip(tops[0][:count], tops[1][:count], strict=True), start=1):
        found.setdefault(other, Logprob(logprob, rank, text(other)))
    return found
