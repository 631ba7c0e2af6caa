"""Beam search: at every step the `beam_width` likeliest continuations of a prompt, by transformers' rules.

A beam is a request. The device gives the likeliest next tokens of each; when those of all beams are here, the search
picks which beams go on, as what, and which are dropped. A beam that goes on twice forks: the other one has the same
pages, and a page is copied when one of them writes to it. Host only: no jax.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tqdm import tqdm

from .queues import Queues
from .request import Request
from .sampling_params import MAX_FLOAT, SamplingParams

MAX_BEAM_WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search; names are vLLM's. ValueError on a bad value, naming the field.

    A sequence's score is the sum of its log-probabilities divided by its length to the power `length_penalty`. The
    search ends when `beam_width` sequences have ended and no beam can score better at its present length, or with
    `early_stopping` at once. `temperature`: only 0; beams are not sampled. `stop`, `stop_token_ids`, `ignore_eos`,
    `include_stop_str_in_output` and `max_tokens` as in `SamplingParams`.
    """

    beam_width: int
    max_tokens: int | None = 16
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool = False
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        width, penalty = self.beam_width, self.length_penalty
        ok = isinstance(width, int) and not isinstance(width, bool) and 1 <= width <= MAX_BEAM_WIDTH
        _accept(ok, "beam_width", width, f"an integer in 1..{MAX_BEAM_WIDTH}")
        ok = isinstance(penalty, int | float) and not isinstance(penalty, bool) and abs(penalty) <= MAX_FLOAT
        _accept(ok, "length_penalty", penalty, "a finite number")
        _accept(self.temperature == 0, "temperature", self.temperature, "0: beams are not sampled")
        _accept(isinstance(self.early_stopping, bool), "early_stopping", self.early_stopping, "True or False")
        assert self.stopping

    @cached_property
    def stopping(self) -> SamplingParams:
        """What ends a sequence."""
        return SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
        )

    def sampling(self, eos_ids: frozenset[int], vocab_size: int) -> SamplingParams:
        """As the device sees it: twice as many candidates as beams, or more where there are several stop ids, so that
        enough go on though some end."""
        stop_ids = set(self.stop_token_ids or ()) | (set() if self.ignore_eos else eos_ids)
        num_candidates = min(max(2, 1 + len(stop_ids)) * self.beam_width, vocab_size)
        return SamplingParams(
            temperature=0, max_tokens=self.max_tokens, ignore_eos=True, logprobs=num_candidates, detokenize=False
        )


@dataclass(frozen=True)
class BeamSearchSequence:
    """A sequence that was found. tokens: prompt and output, the stop token only if include_stop_str_in_output; text:
    all of it."""

    tokens: list[int]
    cum_logprob: float
    score: float
    text: str | None
    finish_reason: str
    stop_reason: int | str | None


@dataclass(frozen=True)
class BeamSearchOutput:
    """The best sequences of a prompt, best first; fewer than `beam_width` where fewer have ended. `error` is set where
    the prompt was refused."""

    sequences: list[BeamSearchSequence]
    error: str | None = None


class BeamSearch:
    """One prompt's beams, and the best sequences that have ended.

    `decode` gives the text of token ids; without it there are no stop strings.
    """

    def __init__(self, root: Request, params: BeamSearchParams, decode: Callable[[list[int]], str] | None = None):
        self.params, self.decode = params, decode
        self.prompt, self.eos_ids = root.prompt_token_ids, root.eos_ids
        self.max_outputs = root.max_len - len(self.prompt)
        self.beams = [root]
        self.ended: list[BeamSearchSequence] = []
        self.done = False
        root.search = self

    @property
    def ready(self) -> bool:
        """Whether the next tokens of all beams are known."""
        return all(beam.candidates is not None for beam in self.beams)

    def advance(self, queues: Queues) -> None:
        """Drops, forks and lengthens the beams."""
        chosen = self._choose()
        if self.done:
            self.end(queues)
            return
        parents = {beam for _, beam, _ in chosen}
        for beam in self.beams:
            if beam not in parents:
                queues.drop(beam)
        self.beams = []
        for _, parent, _ in chosen:
            self.beams.append(queues.branch(parent) if parent in self.beams else parent)
        for beam, (score, _, token) in zip(self.beams, chosen, strict=True):  # now that all forks have been made
            beam.output_token_ids.append(token)
            beam.score, beam.candidates = score, None

    def end(self, queues: Queues) -> None:
        """Frees what the beams hold."""
        for beam in self.beams:
            queues.drop(beam)
        self.beams, self.done = [], True

    def output(self) -> BeamSearchOutput:
        return BeamSearchOutput(list(self.ended))

    def _choose(self) -> list[tuple[float, Request, int]]:
        """The beams that go on, as (score, beam, token); adds to `ended`, and decides whether all is `done`.

        Of the candidates that end only those among the first `beam_width` count.
        """
        width, num_outputs = self.params.beam_width, len(self.beams[0].output_token_ids) + 1
        num_candidates = self.beams[0].params.logprobs or 0
        every = ((b.score + logprob, b, token) for b in self.beams for logprob, token in b.candidates or ())
        going_on, ended = [], self.ended
        for rank, (score, beam, token) in enumerate(heapq.nlargest(num_candidates, every, key=lambda c: c[0])):
            reason = self._ends(beam, token, num_outputs)
            if reason is None:
                going_on.append((score, beam, token))
            elif rank < width:
                ended.append(self._sequence(beam, token, score, *reason))
        self.ended = heapq.nlargest(width, ended, key=lambda sequence: sequence.score)
        going_on = going_on[:width]
        full = len(self.ended) == width
        best = going_on[0][0] / num_outputs**self.params.length_penalty if going_on else 0.0
        self.done = not going_on or (full and (self.params.early_stopping or best <= self.ended[-1].score))
        return going_on

    def _ends(self, beam: Request, token: int, num_outputs: int) -> tuple[str, int | str | None] | None:
        """Finish and stop reason, if this token ends the beam."""
        params = self.params
        if token in self.eos_ids and not params.ignore_eos:
            return "stop", None
        if token in (params.stop_token_ids or ()):
            return "stop", token
        if params.stopping.stop_strings and self.decode:
            text = self.decode([*beam.output_token_ids, token])
            found = next((stop for stop in params.stopping.stop_strings if stop in text), None)
            if found:
                return "stop", found
        return ("length", None) if num_outputs >= self.max_outputs else None

    def _sequence(
        self, beam: Request, token: int, score: float, finish_reason: str, stop_reason: Any
    ) -> BeamSearchSequence:
        length = len(beam.output_token_ids) + 1
        shown = self.params.include_stop_str_in_output
        by_id = finish_reason == "stop" and not isinstance(stop_reason, str)
        tokens = self.prompt + beam.output_token_ids + ([] if by_id and not shown else [token])
        text = self.decode(tokens) if self.decode else None
        if text is not None and isinstance(stop_reason, str):
            at = text.rindex(stop_reason)
            text = text[: at + len(stop_reason) * shown]
        return BeamSearchSequence(
            tokens, score, score / length**self.params.length_penalty, text, finish_reason, stop_reason
        )


def run_searches(engine: Any, searches: Sequence[BeamSearch], use_tqdm: bool) -> None:
    """Steps an `Engine` until these are done."""
    try:
        with tqdm(total=len(searches), desc="searching", disable=not use_tqdm) as bar:
            num_done = 0
            while num_done < len(searches):
                engine.step()
                bar.update(-num_done + (num_done := sum(search.done for search in searches)))
    finally:
        for search in searches:
            engine.abort_search(search)


def _accept(ok: bool, name: str, value: Any, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}; accepted: {accepted}")
