"""Which tokens each step computes, and which pages hold them. Host only: no jax.

There are no phases. Every request has `num_tokens` and chases them with `num_computed_tokens`; a step gives each
running request some of one budget of tokens. A prompt that exceeds what is left is computed over several steps.

Rules: rows that decode go first, then prompts already begun, then waiting requests, each first come, first served. A
request is admitted when the pages of its whole prompt are free, beyond a watermark and beyond what other admitted
prompts have yet to fill. When pages run out, the newest running request is preempted: it loses its pages and its row,
and is computed again from the head of the queue; nothing is admitted in that step.

Tokens are read back some steps late. So `schedule` counts tokens that are still on the device, never goes past a length
limit, and computes at most `lookahead` tokens past an end of sequence that the host has not seen; these are dropped.
Pages can be freed at once although such a step still writes to them: the device runs steps in order, and a page's next
owner writes each slot before it reads it. A preempted request waits until its tokens in flight have been read.
"""

import heapq
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .page_pool import PagePool
from .request import Request, Status

WATERMARK = 0.01


class ScheduledSequence(NamedTuple):
    """Tokens [start, start + num_tokens) of one request.

    `decode`: the single token is on the device, in the request's row. `samples`: the step reaches the last token, so a
    new one is sampled. `new_pages`: (logical page, physical page) pairs that join the row's page table.
    """

    request: Request
    row: int
    start: int
    num_tokens: int
    decode: bool
    samples: bool
    new_pages: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Schedule:
    """One step's work: decoding sequences first, then prompts. `admitted` requests need their rows' state written."""

    sequences: list[ScheduledSequence]
    admitted: list[Request]

    @property
    def num_decodes(self) -> int:
        return sum(s.decode for s in self.sequences)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.sequences)


@dataclass
class SchedulerStats:
    """Counters since the start."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_scheduled_tokens: int = 0
    used_slots: int = 0
    allocated_slots: int = 0


@dataclass
class _Plan:
    """A schedule in the making: how many tokens each request gets, and the budget left."""

    budget: int
    tokens: dict[Request, int] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)
    preempted: bool = False


class Scheduler:
    """Continuous batching over a page pool.

    Every step computes at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests.
    """

    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int):
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens}; accepted: at least max_num_seqs={max_num_seqs}"
            )
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self.stats = SchedulerStats()
        self._free_rows = list(range(max_num_seqs))  # a heap: low rows first
        self._num_added = 0
        self._watermark = int(WATERMARK * pool.num_usable)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError if the pool could never hold it."""
        pages = self.pool.pages_for(request.max_len)
        if pages > self.pool.num_usable:
            raise ValueError(
                f"request {request.request_id!r} may reach {request.max_len} tokens, {pages} pages of "
                f"{self.pool.page_size}; the pool has {self.pool.num_usable}"
            )
        request.order = self._num_added
        self._num_added += 1
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """Ends a request at any moment; its tokens in flight are dropped."""
        if request.status is not Status.FINISHED:
            request.finish_reason, request.metrics.finished = "abort", time.perf_counter()
            self._finish(request)

    def schedule(self) -> Schedule:
        """Picks the next step's tokens and allocates their pages. An empty schedule: nothing can be computed now."""
        plan = _Plan(self.max_num_batched_tokens)
        chasing = [(r, num_tokens) for r in self.running if (num_tokens := r.num_to_compute)]
        for decoding in (True, False):
            for request, num_tokens in chasing:
                if request.decoding is decoding and request.status is Status.RUNNING and plan.budget:
                    self._plan_running(plan, request, min(num_tokens, plan.budget))
        if not plan.preempted:
            self._admit(plan)
        return self._commit(plan)

    def update(self, schedule: Schedule, token_ids: list[int]) -> list[Request]:
        """Appends the tokens that a schedule sampled, one per sequence (ignored where it does not sample).

        Returns the requests that got a token; those now finished have freed their pages.
        """
        progressed = []
        for sequence, token_id in zip(schedule.sequences, token_ids, strict=True):
            request = sequence.request
            if not sequence.samples or request.status is Status.FINISHED:
                continue
            request.num_in_flight -= 1
            request.append(token_id)
            if request.finish_reason:
                self._finish(request)
            progressed.append(request)
        return progressed

    def check_integrity(self) -> None:
        """The pool is whole, and its used pages and rows are exactly those of running requests."""
        self.pool.check_integrity()
        pages = [page for r in self.running for page in r.pages]
        assert len(pages) == len(set(pages)) == self.pool.num_used, "a page has two owners or none"
        assert not any(r.pages or r.row is not None for r in self.waiting), "a waiting request holds pages or a row"
        rows = [r.row for r in self.running if r.row is not None] + self._free_rows
        assert sorted(rows) == list(range(len(rows))), "a row has two owners or none"
        for r in self.running:
            assert len(r.pages) == self.pool.pages_for(r.num_computed_tokens), "a page too many or too few"

    def _plan_running(self, plan: _Plan, request: Request, num_tokens: int) -> None:
        missing = self._missing_pages(request, num_tokens)
        while missing > self.pool.num_free and request.status is Status.RUNNING:
            self._preempt(plan, self.running[-1])
        if request.status is Status.RUNNING:
            self._take(plan, request, num_tokens, missing)

    def _admit(self, plan: _Plan) -> None:
        if not (self.waiting and self._free_rows and plan.budget):
            return
        reserved = sum(self._missing_pages(r, r.num_to_compute) for r in self.running)
        while self.waiting and self._free_rows and plan.budget:
            request = self.waiting[0]
            watermark = self._watermark if self.running else 0
            pages = self.pool.pages_for(request.num_tokens)
            if request.num_in_flight or pages > self.pool.num_free - reserved - watermark:
                return
            self.waiting.popleft()
            request.status, request.row = Status.RUNNING, heapq.heappop(self._free_rows)
            if request.metrics.first_scheduled is None:
                request.metrics.first_scheduled = time.perf_counter()
            self._insert_running(request)
            plan.admitted.append(request)
            num_tokens = min(request.num_to_compute, plan.budget)
            self._take(plan, request, num_tokens, self._missing_pages(request, num_tokens))
            reserved += pages - len(request.pages)

    def _insert_running(self, request: Request) -> None:
        at = len(self.running)
        while at and self.running[at - 1].order > request.order:
            at -= 1
        self.running.insert(at, request)

    def _missing_pages(self, request: Request, num_tokens: int) -> int:
        return self.pool.pages_for(request.num_computed_tokens + num_tokens) - len(request.pages)

    def _take(self, plan: _Plan, request: Request, num_tokens: int, missing: int) -> None:
        if missing:
            request.pages += self.pool.allocate(missing)
        plan.tokens[request] = num_tokens
        plan.budget -= num_tokens

    def _preempt(self, plan: _Plan, request: Request) -> None:
        plan.budget += plan.tokens.pop(request, 0)
        plan.preempted = True
        self._release(request)
        request.status = Status.WAITING
        request.num_computed_tokens = 0
        request.metrics.num_preemptions += 1
        self.stats.num_preemptions += 1
        self.waiting.appendleft(request)

    def _commit(self, plan: _Plan) -> Schedule:
        """Turns the plan, which has decoding requests first, into a schedule and counts its tokens as computed."""
        sequences = [self._sequence(request, n) for request, n in plan.tokens.items()]
        if sequences:
            self.stats.num_steps += 1
            self.stats.num_scheduled_tokens += sum(s.num_tokens for s in sequences)
            self.stats.used_slots += sum(r.num_computed_tokens for r in self.running)
            self.stats.allocated_slots += self.pool.num_used * self.pool.page_size
        return Schedule(sequences, plan.admitted)

    def _sequence(self, request: Request, num_tokens: int) -> ScheduledSequence:
        start, decode, row = request.num_computed_tokens, request.decoding, request.row
        assert row is not None
        request.num_computed_tokens = end = start + num_tokens
        samples = end == request.num_tokens
        if samples:
            request.num_in_flight += 1
            request.decoding = True
        first_new, pages = self.pool.pages_for(start), request.pages
        new_pages = list(enumerate(pages[first_new:], first_new)) if len(pages) > first_new else ()
        return ScheduledSequence(request, row, start, num_tokens, decode, samples, new_pages)

    def _release(self, request: Request) -> None:
        """Takes a running request's pages and row back."""
        self.running.remove(request)
        self.pool.free(request.pages)
        assert request.row is not None
        heapq.heappush(self._free_rows, request.row)
        request.pages, request.row, request.decoding = [], None, False

    def _finish(self, request: Request) -> None:
        if request.status is Status.RUNNING:
            self._release(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
