"""Rollouts: prompts of token ids in, arrays for a training step out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .engine import Engine
from .request import Request, Status
from .sampling_params import SamplingParams

FINISH_REASONS = "stop", "length", "abort"


class RolloutBatch(NamedTuple):
    """N = prompts x n completions, those of a prompt together: a pytree of numpy arrays, all [N, L] or [N].

    A row is a prompt, its completion right behind it, then padding, so that positions are 0, 1, 2, ... and causal
    attention needs no mask. L is `prompt_length + max_tokens`, the same for every batch. What is said of a token stands
    where the token stands; where none was sampled, `logprobs` are 0 and `policy_versions` -1.

    `logprobs` are those of the distribution that a token was sampled from: after penalties, bias, bans, temperature,
    min-p, top-k and top-p. Greedy rows have those of temperature 1. `policy_versions`: how often the weights had been
    updated that sampled it. `finish_reasons` index FINISH_REASONS.
    """

    tokens: Any  # i32 [N, L]
    token_mask: Any  # bool [N, L], where a token of prompt or completion stands
    completion_mask: Any  # bool [N, L], where a sampled one does
    prompt_lens: Any  # i32 [N]
    completion_lens: Any  # i32 [N]
    logprobs: Any  # f32 [N, L]
    policy_versions: Any  # i32 [N, L]
    finish_reasons: Any  # i32 [N]

    @property
    def completions(self) -> list[list[int]]:
        """The sampled token ids of every row."""
        rows = zip(self.tokens, self.prompt_lens, self.prompt_lens + self.completion_lens, strict=True)
        return [tokens[first:end].tolist() for tokens, first, end in rows]


def collect(
    engine: Engine,
    add: Callable[[str, Sequence[int], SamplingParams], list[Request]],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    prompt_length: int | None = None,
    pad_token_id: int = 0,
) -> RolloutBatch:
    """Steps the engine until `params.n` completions of every prompt are there. `add` queues a prompt's, recorded.

    `prompt_length` is what prompts are padded to, None for the longest. With a `seed`, completion j of prompt i has
    seed + i * n + j. ValueError on what cannot run, and then nothing does.
    """
    longest = max(map(len, prompts), default=0)
    width = longest if prompt_length is None else prompt_length
    if params.max_tokens is None:
        raise ValueError("max_tokens=None; accepted: an integer, for it is the width of a rollout's arrays")
    if not prompts or longest > width:
        raise ValueError(f"{len(prompts)} prompts of up to {longest} tokens; accepted: 1 or more, up to {width}")
    requests: list[Request] = []
    try:
        for i, prompt in enumerate(prompts):
            seed = None if params.seed is None else params.seed + i * params.n
            try:
                requests += add(str(i), prompt, replace(params, seed=seed, detokenize=bool(params.stop)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"prompt {i}: {error}") from error
        unfinished = set(requests)
        while unfinished:
            unfinished.difference_update(r for r in engine.step() if r.status is Status.FINISHED)
    finally:
        engine.abort(requests)
    return batch(requests, width + params.max_tokens, pad_token_id)


def batch(requests: Sequence[Request], length: int, pad_token_id: int) -> RolloutBatch:
    """The arrays of finished requests, `length` tokens wide."""
    prompt_lens = np.array([len(r.prompt_token_ids) for r in requests], np.int32)
    completion_lens = np.array([len(r.output_token_ids) for r in requests], np.int32)
    position, ends = np.arange(length), prompt_lens + completion_lens
    token_mask = position < ends[:, None]
    completion_mask = token_mask & (position >= prompt_lens[:, None])

    def spread(mask: np.ndarray, values: Sequence[Sequence[float]], other: float, dtype: type) -> np.ndarray:
        rows = np.full(mask.shape, other, dtype)
        rows[mask] = np.concatenate([np.asarray(row, dtype) for row in values])
        return rows

    return RolloutBatch(
        tokens=spread(token_mask, [r.prompt_token_ids + r.output_token_ids for r in requests], pad_token_id, np.int32),
        token_mask=token_mask,
        completion_mask=completion_mask,
        prompt_lens=prompt_lens,
        completion_lens=completion_lens,
        logprobs=spread(completion_mask, [r.recorded_logprobs for r in requests], 0, np.float32),
        policy_versions=spread(completion_mask, [r.policy_versions for r in requests], -1, np.int32),
        finish_reasons=np.array([FINISH_REASONS.index(r.finish_reason or "abort") for r in requests], np.int32),
    )
