"""Requests without a model, whose right outputs are known.

Token ids are consecutive within a request and disjoint between requests, and the fake model's next token is the last
plus one. So each slot that a step reads shows whose it is and which position it holds, and the right output of a
request is known without running anything: it follows from its prompt alone.
"""

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from pagedjax.allocation import ALLOCATIONS
from pagedjax.beam_search import BeamSearch, BeamSearchParams
from pagedjax.request import Request
from pagedjax.sampling_params import SamplingParams
from pagedjax.swap import SwapCosts

STRIDE = 1000  # token ids of request i start at STRIDE * (i + 1)
APART = 200  # and the outputs of its samples lie so far apart
SOMETIMES_SWAPS = SwapCosts(page_bytes=0, token_operations=0, pair_operations=1e9)  # from 8 tokens on


@dataclass(frozen=True)
class Job:
    """A request to come: `end_after` outputs its EOS comes, `abort_at` steps after the first the user leaves."""

    prompt_len: int
    max_tokens: int
    end_after: int | None = None
    arrives_at: int = 0
    abort_at: int | None = None
    family: int | None = None  # whose members' prompts and outputs begin alike
    samples: int = 1
    priority: int = 0
    beams: int = 0  # of a search; else none

    @property
    def max_len(self) -> int:
        return self.prompt_len + self.max_tokens

    @property
    def num_outputs(self) -> int:
        return min(self.max_tokens, self.end_after or self.max_tokens)

    def num_pages(self, page_size: int) -> int:
        """That it may take alone."""
        return -(-self.max_len // page_size) * max(self.beams, 1)


@dataclass(frozen=True)
class Case:
    """A configuration and what happens to it."""

    jobs: tuple[Job, ...]
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    lookahead: int
    decode_steps: int = 1
    max_mixed_tokens: int | None = None
    caching: bool = True
    allocation: str = "paged"
    swap_copies: int = 0  # for which the host has room
    swap_costs: SwapCosts | None = None

    @property
    def max_model_len(self) -> int:
        return max(job.max_len for job in self.jobs)


@st.composite
def jobs(draw: st.DrawFn, aborts: bool = True) -> Job:
    """One request; shrinks towards a short one that arrives at once and ends by length."""
    beams = draw(st.sampled_from([0, 0, 0, 2, 3]))
    return Job(
        beams=beams,
        prompt_len=draw(st.integers(1, 12)),
        max_tokens=draw(st.integers(1, 30)),
        end_after=draw(st.none() | st.integers(1, 20)),
        arrives_at=draw(st.integers(0, 10)),
        abort_at=draw(st.none() | st.none() | st.integers(0, 40)) if aborts else None,
        family=draw(st.none() | st.integers(0, 1)),
        samples=1 if beams else draw(st.sampled_from([1, 1, 2, 4])),
        priority=draw(st.sampled_from([0, 0, 0, 1, -1])),
    )


@st.composite
def cases(draw: st.DrawFn, aborts: bool = True) -> Case:
    """Pools down to just one request (and sometimes with a watermark), pages of one token, budgets of one a row."""
    chosen = tuple(draw(st.lists(jobs(aborts=aborts), min_size=1, max_size=10)))
    page_size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    searches = any(job.beams for job in chosen)
    allocation = "paged" if searches else draw(st.sampled_from(["paged", *ALLOCATIONS]))
    least = max(job.num_pages(page_size) for job in chosen)
    least = least if ALLOCATIONS[allocation].shares else 1 << (least - 1).bit_length()  # the longest job's run
    spare = 100 if draw(st.integers(0, 7)) == 7 else draw(st.integers(0, least // 2))
    max_num_seqs = draw(st.integers(max(1, *(job.beams for job in chosen)), 6))
    budget = max_num_seqs + draw(st.integers(0, 24))
    return Case(
        jobs=chosen,
        num_pages=1 + least + spare,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        lookahead=draw(st.integers(0, 3)),
        decode_steps=min(draw(st.sampled_from([1, 1, 2, 5])), page_size),
        max_mixed_tokens=draw(st.integers(1, budget)),
        caching=ALLOCATIONS[allocation].shares and draw(st.booleans()),
        allocation=allocation,
        swap_copies=draw(st.sampled_from([0, 1, 2, 100])),
        swap_costs=draw(st.sampled_from([None, None, SOMETIMES_SWAPS])),
    )


def make_request(number: int, job: Job, sample: int = 0) -> Request:
    first = STRIDE * (number + 1 if job.family is None else 100 + job.family)
    end = set() if job.end_after is None else {first + job.prompt_len + job.end_after - 1 + sample * APART}
    return Request(
        request_id=f"request-{number}",
        prompt_token_ids=list(range(first, first + job.prompt_len)),
        params=SamplingParams(max_tokens=job.max_tokens, logprobs=2 * job.beams or None),
        max_len=job.max_len,
        seed=sample,
        eos_ids=frozenset(end),
        priority=job.priority,
    )


def make_search(root: Request, job: Job) -> BeamSearch:
    return BeamSearch(root, BeamSearchParams(beam_width=job.beams, max_tokens=job.max_tokens))


def candidates_of(request: Request) -> list[tuple[float, int]]:
    """What might come after a beam's tokens: any tokens, but always the same."""
    seed = sum((i + 3) * token for i, token in enumerate(request.token_ids(0, request.num_tokens)))
    first = request.prompt_token_ids[0] + len(request.prompt_token_ids)
    count = request.params.logprobs or 0
    return [(-1 - (seed * (i + 7) % 101) / 50, first + (seed + i) % APART) for i in range(count)]


class NoPages:
    """For beams that need none."""

    def drop(self, request: Request) -> None:
        pass

    def branch(self, beam: Request) -> Request:
        return replace(beam, output_token_ids=list(beam.output_token_ids))


def searched(number: int, job: Job) -> BeamSearch:
    """A search by itself."""
    search: Any = make_search(make_request(number, job), job)
    while not search.done:
        for beam in search.beams:
            beam.candidates = candidates_of(beam)
        search.advance(NoPages())
    return search


def token_at(request: Request, position: int) -> int:
    """The right token of a request."""
    if request.search:
        tokens = request.token_ids(position, position + 1)
        return tokens[0] if tokens else -1  # which the host has yet to pick
    apart = APART * request.seed if position >= len(request.prompt_token_ids) else 0
    return request.prompt_token_ids[0] + position + apart
