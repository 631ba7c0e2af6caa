"""Who waits, who runs, and what those who run have: rows and pages. Host only: no jax."""

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .page_pool import PagePool
from .prefix_cache import PrefixCache
from .request import Request, Status
from .schedule import ScheduledSequence, SchedulerStats
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


class Queues:
    """Requests by state, and the moves between states."""

    def __init__(self, pool: PagePool, max_num_seqs: int, cache: PrefixCache | None, swap: SwapSpace | None = None):
        self.pool, self.cache, self.swap = pool, cache, swap
        self.waiting: deque[Request] = deque()  # by priority, then in order of arrival
        self.running: list[Request] = []  # the same
        self.stats = SchedulerStats()
        self._free_rows = list(range(max_num_seqs))  # a heap: low rows first
        self._forked: list[Request] = []  # in the newest schedule, parents among them
        self._num_added = 0

    def check_integrity(self) -> None:
        """The pool is whole, and its used pages and rows are exactly those of running requests."""
        self.pool.check_integrity()
        pages = [page for r in self.running for page in r.pages]
        assert len(pages) == self.pool.num_references, "a page's users are not those who have it"
        assert len(set(pages)) == self.pool.num_used, "a page is used by nobody"
        assert not any(r.pages or r.row is not None for r in self.waiting), "a waiting request holds pages or a row"
        rows = [r.row for r in self.running if r.row is not None] + self._free_rows
        assert sorted(rows) == list(range(len(rows))), "a row has two owners or none"
        for r in self.running:
            assert len(r.pages) == self.pool.pages_for(r.num_computed_tokens), "a page too many or too few"
        if self.swap:
            self.swap.check_integrity(self.waiting)

    def _insert_running(self, request: Request) -> None:
        at = len(self.running)
        while at and self.running[at - 1].order > request.order:
            at -= 1
        self.running.insert(at, request)

    def _insert_waiting(self, request: Request) -> None:
        self.waiting.insert(bisect_left(self.waiting, request.order, key=lambda r: r.order), request)

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
        self.pool.free(request.pages)
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
