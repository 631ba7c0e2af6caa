"""Who waits, who runs, and what those who run have: rows and pages. Host only: no jax."""

import heapq
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from .allocation import Allocation
from .page_pool import PagePool
from .prefix_cache import PrefixCache
from .request import Request, Status
from .schedule import ScheduledSequence, SchedulerStats
from .slots import Slots, count_slots
from .swap import SwapSpace


@dataclass
class Plan:
    """A schedule in the making, and the budget left."""

    budget: int
    sequences: list[ScheduledSequence] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    tables: list[tuple[int, list[int]]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: bool = False
    beams: bool = False


class Queues:
    """Requests by state, and the moves between states."""

    def __init__(
        self,
        pool: PagePool,
        max_num_seqs: int,
        cache: PrefixCache | None,
        allocation: Allocation,
        swap: SwapSpace | None = None,
    ):
        self.pool, self.cache, self.allocation, self.swap = pool, cache, allocation, swap
        self.waiting: deque[Request] = deque()  # by priority, then in order of arrival
        self.running: list[Request] = []  # the same
        self.stats = SchedulerStats()
        self._free_rows = list(range(max_num_seqs))  # a heap: low rows first
        self._forked: list[Request] = []  # in the newest schedule, parents among them
        self._num_added = 0

    def check_integrity(self) -> None:
        """The pool is whole, and its used pages and rows are exactly those of running requests."""
        self.pool.check_integrity()
        self.allocation.check_integrity(self.running)
        slots = self.slots()
        assert sum(slots) == self.pool.num_usable * self.pool.page_size and min(slots) >= 0, "a slot is counted wrongly"
        assert not any(r.pages or r.row is not None for r in self.waiting), "a waiting request holds pages or a row"
        rows = [r.row for r in self.running if r.row is not None] + self._free_rows
        assert sorted(rows) == list(range(len(rows))), "a row has two owners or none"
        for r in self.running:
            assert len(r.pages) == self.pool.pages_for(r.num_computed_tokens), "a page too many or too few"
        if self.swap:
            self.swap.check_integrity(self.waiting)

    def slots(self, sharing: Sequence[Request] | None = None) -> Slots:
        """What the pool's slots are used for now. `sharing`: as `count_slots` has it, if it is known; O(running)."""
        first = self.waiting[0] if self.waiting else None
        sharing = self.running if sharing is None else sharing
        return count_slots(self.pool, self.allocation, self.running, sharing, first)

    @property
    def unfinished(self) -> Iterator[Request]:
        """All that run, wait, or wait for another to fork from it."""
        for request in (*self.running, *self.waiting):
            yield request
            yield from request.forks

    def begin_policy(self, version: int, recompute: bool) -> None:
        """The weights are others from now on: none may be swapped in that had been computed by the old ones, and with
        `recompute` none goes on in pages that these have filled."""
        for request in self.unfinished:
            request.begin_policy(version)
        if recompute:
            for request in reversed(self.running.copy()):
                self._preempt(Plan(0), request)
        if self.swap:
            self.swap.clear()

    def drop(self, request: Request) -> None:
        """Ends a beam, whose search goes on without it or is over."""
        if request.status is not Status.FINISHED:
            self._finish(request)

    def branch(self, beam: Request) -> Request:
        """Another beam with the same tokens: on the same pages if there is a row for it, else it waits."""
        other = replace(
            beam,
            order=beam.order,
            status=Status.WAITING,
            output_token_ids=list(beam.output_token_ids),
            num_computed_tokens=0,
            pages=[],
            row=None,
            page_keys=list(beam.page_keys),
        )
        if beam.status is Status.RUNNING and self._free_rows:
            self._share_pages(beam, other)
            self._forked += [beam, other]
        else:
            self._insert_waiting(other)
        return other

    def _share_pages(self, parent: Request, fork: Request) -> None:
        """Gives a fork a row, and its parent's pages."""
        fork.status, fork.row = Status.RUNNING, heapq.heappop(self._free_rows)
        fork.pages, fork.page_keys = list(parent.pages), list(parent.page_keys)
        self.pool.share(fork.pages)
        fork.num_computed_tokens = parent.num_computed_tokens
        fork.num_published, fork.num_resets = parent.num_published, parent.num_resets
        fork.num_cached_tokens = parent.num_cached_tokens
        self._insert_running(fork)

    def _begin(self, request: Request, found: list[int]) -> None:
        """A request's first pages, and what it need not compute."""
        self.pool.share(found)
        request.pages, request.num_published = list(found), len(found)
        request.num_computed_tokens = len(found) * self.pool.page_size
        if self.cache:
            request.num_resets = self.cache.num_resets
            self.cache.stats.num_queries += request.num_tokens
            self.cache.stats.num_hits += request.num_computed_tokens
        if request.metrics.first_scheduled is None:
            request.metrics.first_scheduled = time.perf_counter()
            request.num_cached_tokens = request.num_computed_tokens

    def _stalled(self, plan: Plan) -> bool:
        """Whether beams that run wait for others of their searches, and these for pages or rows: then the last to come
        gives way."""
        if plan.sequences or not self.running or not self.waiting or self.waiting[0].num_in_flight:
            return False
        return all(r.search and not r.num_in_flight for r in self.running)

    def _insert_running(self, request: Request) -> None:
        at = len(self.running)
        while at and self.running[at - 1].order > request.order:
            at -= 1
        self.running.insert(at, request)

    def _insert_waiting(self, request: Request) -> None:
        self.waiting.insert(bisect_left(self.waiting, request.order, key=lambda r: r.order), request)

    def _take_pages(self, request: Request, count: int) -> list[tuple[int, int]]:
        """A request's next pages, as (logical page, physical page)."""
        first = len(request.pages)
        self.allocation.take(request, count)
        return list(enumerate(request.pages[first:], first))

    def _missing_pages(self, request: Request, num_tokens: int) -> int:
        return self.pool.pages_for(request.num_computed_tokens + num_tokens) - len(request.pages)

    def _preempt(self, plan: Plan, request: Request) -> None:
        plan.preempted = True
        taken = [i for i, s in enumerate(plan.sequences) if s.request is request]
        if taken:  # it decodes, and a prompt of a higher priority wants its pages
            assert plan.sequences.pop(taken[0]).decode, "preempted with prompt tokens in the same step"
            plan.budget += 1
            request.num_computed_tokens -= 1
            request.num_in_flight -= 1
        if self.swap:
            self.swap.take_out(request, self.pool, plan.copies)
        self._release(request)
        request.status = Status.WAITING
        request.num_computed_tokens = 0
        request.metrics.num_preemptions += 1
        self.stats.num_preemptions += 1
        self._insert_waiting(request)

    def _release(self, request: Request) -> None:
        """Takes a running request's pages and row back."""
        if self.cache:
            self.cache.publish(request)
        self.running.remove(request)
        self.allocation.release(request)
        assert request.row is not None
        heapq.heappush(self._free_rows, request.row)
        request.pages, request.row, request.decoding = [], None, False

    def _finish(self, request: Request) -> None:
        if request.status is Status.RUNNING:
            self._release(request)
        elif request.parent:
            request.parent.forks.remove(request)
        else:
            self.waiting.remove(request)
        if self.swap:
            self.swap.drop(request)
        request.status = Status.FINISHED
        self._promote(request)

    def _leave_to(self, parent: Request, forks: Sequence[Request]) -> None:
        parent.forks = list(forks)
        for fork in forks:
            fork.parent = parent

    def _promote(self, parent: Request) -> None:
        """Forks that their parent leaves behind wait as requests do, the first as parent of the others."""
        if parent.forks:
            first, *others = parent.forks
            parent.forks, first.parent = [], None
            self._leave_to(first, others)
            self._insert_waiting(first)
