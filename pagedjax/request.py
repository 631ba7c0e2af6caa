"""What a user asks for and what comes back: the state of a request, and its outputs. No jax here."""

import enum
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .sampling_params import SamplingParams


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token, its rank in the vocabulary (1 is the likeliest), and its text, if detokenized."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]


@dataclass(slots=True)
class RequestMetrics:
    """Host times in seconds (`time.perf_counter`), and how often the request was preempted."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_preemptions: int = 0


@dataclass(frozen=True)
class CompletionOutput:
    """One generated sequence. finish_reason: stop, length or abort; stop_reason: the stop id or string that ended
    it; policy_versions: of the weights that each token was sampled by, how often they had been updated."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[Logprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    policy_versions: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class RequestOutput:
    """All sequences of one request so far. `error` is set, and `outputs` empty, where the request was refused."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class SamplerNeeds(NamedTuple):
    """What a request asks of the sampler."""

    random: bool
    truncated: bool
    adjusted: bool
    masked: bool
    logprobs: int | None
    recorded: bool


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Request:
    """Host state of one sequence, from arrival to its last token.

    `num_computed_tokens` chases `num_tokens`: prefill, its chunks, decoding and recomputation after preemption are
    all the same chase. Tokens sampled on the device that the host has not read yet are `num_in_flight`. `max_len`
    bounds prompt and output together. `row` is the request's row of the device state while it runs; `decoding` says
    that the row holds its newest token, so that one token is left to compute. `order` is its priority, where less
    comes sooner, and its number in order of arrival. `stop_ids` end it, from min_tokens on; `constraint`, what the
    output must be (`structured.py`), ends it where nothing can follow. `adjusted`: its logits are changed before
    sampling, by penalties, bias, or tokens banned or allowed. `cache_salt`: requests with another one do not share
    pages. `search`: the beam search that picks its tokens, from `candidates`, the likeliest ones with their
    log-probabilities once these are known; `score` is the sum over those picked. `forks`: samples of the same prompt
    that wait until this request, their `parent`, has computed it. `num_cached_tokens`: of the prompt, found in the
    prefix cache when it was first admitted; `num_published` of its pages can be found there, by `page_keys`, and
    `num_resets` of it had been when the request was last admitted. `recorded`: `recorded_logprobs` are kept, those of
    the sampled tokens under the distribution that they came from. `policy_runs`: (output token, version of the weights)
    wherever another version begins.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_len: int
    seed: int = 0
    eos_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    cache_salt: str | None = None
    priority: int = 0
    recorded: bool = False
    policy_runs: tuple[tuple[int, int], ...] = ((0, 0),)
    detokenizer: Any = None
    constraint: Any = None
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.perf_counter()))
    order: tuple[int, int] = (0, 0)
    status: Status = Status.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_in_flight: int = 0
    pages: list[int] = field(default_factory=list)
    row: int | None = None
    decoding: bool = False
    search: Any = None
    score: float = 0.0
    candidates: list[tuple[float, int]] | None = None
    forks: list["Request"] = field(default_factory=list)
    parent: "Request | None" = None
    num_cached_tokens: int = 0
    num_published: int = 0
    num_resets: int = 0
    page_keys: list[tuple[bytes, bytes]] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    recorded_logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    stop_ids: frozenset[int] = field(init=False)
    adjusted: bool = field(init=False)
    needs: SamplerNeeds = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        self.stop_ids = frozenset(p.stop_token_ids or ()) | (frozenset() if p.ignore_eos else self.eos_ids)
        changed = p.penalized or p.logit_bias or p.allowed_token_ids is not None
        self.adjusted = bool(changed or self.bad_words or self.banned_until)
        random = not p.greedy
        switches = random, random and p.truncated, self.adjusted, bool(self.constraint)
        self.needs = SamplerNeeds(*switches, p.logprobs, self.recorded)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, those in flight included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_in_flight

    @property
    def num_to_compute(self) -> int:
        """Tokens without KV yet; none once the tokens in flight reach the length limit."""
        num_tokens = self.num_tokens
        return 0 if num_tokens >= self.max_len else num_tokens - self.num_computed_tokens

    @property
    def banned_until(self) -> tuple[int, ...]:
        """Ids that may not come before min_tokens."""
        ids = self.eos_ids | frozenset(self.params.stop_token_ids or ())
        return tuple(sorted(ids)) if self.params.min_tokens else ()

    def begin_policy(self, version: int) -> None:
        """Tokens that no step dispatched so far samples come from this version of the weights."""
        first = len(self.output_token_ids) + self.num_in_flight
        self.policy_runs = (*(run for run in self.policy_runs if run[0] < first), (first, version))

    @property
    def policy_versions(self) -> list[int]:
        """One for each output token."""
        ends = [*(first for first, _ in self.policy_runs[1:]), len(self.output_token_ids)]
        runs = zip(self.policy_runs, ends, strict=True)
        return [version for (first, version), end in runs for _ in range(first, min(end, ends[-1]))]

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens [start, end) of prompt and output."""
        split = len(self.prompt_token_ids)
        if end <= split:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:split] + self.output_token_ids[max(start - split, 0) : end - split]

    def append(self, token_id: int) -> None:
        """Takes a sampled token and decides whether it is the last: EOS, stop ids, length, stop strings.

        The token that stops a sequence stays in `output_token_ids`; its text appears if
        include_stop_str_in_output.
        """
        self.output_token_ids.append(token_id)
        num_outputs = len(self.output_token_ids)
        if num_outputs == 1:
            self.metrics.first_token = time.perf_counter()
        stopped_by_id = token_id in self.stop_ids and num_outputs >= self.params.min_tokens
        if stopped_by_id:
            by_eos = token_id in self.eos_ids and not self.params.ignore_eos
            self.finish_reason, self.stop_reason = "stop", None if by_eos else token_id
        elif len(self.prompt_token_ids) + num_outputs >= self.max_len:
            self.finish_reason = "length"
        if self.constraint:
            self._constrain(token_id)
        if self.detokenizer and (not stopped_by_id or self.params.include_stop_str_in_output):
            stop = self.detokenizer.append(token_id)
            if stop is not None and not stopped_by_id:
                self.finish_reason, self.stop_reason = "stop", stop
        if self.finish_reason:
            self.metrics.finished = time.perf_counter()

    def _constrain(self, token_id: int) -> None:
        """What may follow; an output that is whole has not been cut off by its length."""
        if not self.constraint.accept(token_id):
            self.finish_reason, self.stop_reason = "abort", self.constraint.error or None
        elif self.constraint.is_done and self.finish_reason != "stop":
            self.finish_reason, self.stop_reason = "stop", None


def completion(index: int, request: Request, finished: bool) -> CompletionOutput:
    """What one sequence has produced so far; unfinished text holds back what may yet become a stop string."""
    wants_logprobs = request.params.logprobs is not None
    sampled = zip(request.logprobs, request.output_token_ids, strict=False)
    return CompletionOutput(
        index=index,
        text=request.detokenizer.stable_text(finished) if request.detokenizer else "",
        token_ids=list(request.output_token_ids),
        cumulative_logprob=sum(found[token].logprob for found, token in sampled) if wants_logprobs else None,
        logprobs=list(request.logprobs) if wants_logprobs else None,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        policy_versions=request.policy_versions,
    )


def request_output(prompt: str | None, requests: list[Request]) -> RequestOutput:
    """The output of the sequences that belong to one prompt."""
    first = requests[0]
    return RequestOutput(
        request_id=first.request_id,
        prompt=prompt,
        prompt_token_ids=first.prompt_token_ids,
        prompt_logprobs=list(first.prompt_logprobs) if first.params.prompt_logprobs is not None else None,
        outputs=[completion(i, r, r.status is Status.FINISHED) for i, r in enumerate(requests)],
        finished=all(r.status is Status.FINISHED for r in requests),
        metrics=first.metrics,
        num_cached_tokens=first.num_cached_tokens,
    )
