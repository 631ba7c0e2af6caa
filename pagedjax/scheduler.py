"""Which tokens each step computes, and which pages hold them. Host only: no jax.

There are no phases. Every request has `num_tokens` and chases them with `num_computed_tokens`; a step gives each
running request some of one budget of tokens. A prompt that exceeds what is left is computed over several steps.

Rules: rows that decode go first, then prompts already begun, then waiting requests, each by priority, then first come,
first served. None loses its row for another to be admitted. Beside rows that decode, prompts get less of the budget,
since all wait for the same step. A request is admitted when the pages of its whole prompt are free, beyond a watermark
and beyond what other admitted prompts have yet to fill. When pages run out, the last running request by that order is
preempted: it loses its pages and its row, and is computed again when its turn comes, or swapped in; nothing is admitted
in that step.

Samples of one prompt (forks) start when it has been computed, on the same pages. The last page, filled in part, is
copied for whoever is about to write to it while another has it too. So it is with beams, which a search forks and drops
when the host has the candidates of all of them.

Tokens are read back some steps late. So `schedule` counts tokens that are still on the device, never goes past a length
limit, and computes the tokens of at most `lookahead` dispatches past an end of sequence that the host has not seen;
these are dropped.
Pages can be freed at once although such a step still writes to them: the device runs steps in order, and a page's next
owner writes each slot before it reads it. A preempted request waits until its tokens in flight have been read.
"""

import heapq
import time
from collections.abc import Sequence
from dataclasses import replace

from .allocation import Allocation, Paged
from .page_pool import PagePool
from .prefix_cache import PrefixCache
from .queues import Plan, Queues
from .request import Request, Status
from .schedule import Schedule, ScheduledSequence
from .swap import SwapSpace

MAX_LATECOMERS = 2  # waiting prompts, up to which rows that decode are spared long steps
WATERMARK = 0.01


class Scheduler(Queues):
    """Continuous batching over a page pool.

    Every step computes at most `max_num_batched_tokens` tokens of at most `max_num_seqs` requests; at most
    `max_mixed_tokens` of them where one prompt or two join rows that decode, doubled until prompts have a quarter. If
    more prompts wait, the rows do: the sooner all decode, the sooner all are done.
    """

    def __init__(
        self,
        pool: PagePool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_mixed_tokens: int | None = None,
        cache: PrefixCache | None = None,
        allocation: Allocation | None = None,
        swap: SwapSpace | None = None,
    ):
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens}; accepted: at least max_num_seqs={max_num_seqs}"
            )
        super().__init__(pool, max_num_seqs, cache, allocation or Paged(pool), swap)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_mixed_tokens = max_mixed_tokens or max_num_batched_tokens
        self._watermark = int(WATERMARK * pool.num_usable)

    def add(self, request: Request, forks: Sequence[Request] = ()) -> None:
        """Queues a request, and other samples of its prompt, which is computed once if they can share its pages.
        Raises ValueError if the pool could never hold one of them."""
        self.allocation.check(request)
        for sample in (request, *forks):
            sample.order = sample.priority, self._num_added
            self._num_added += 1
        if self.allocation.shares:
            self._leave_to(request, forks)
            forks = ()
        for sample in (request, *forks):
            self._insert_waiting(sample)

    def abort(self, request: Request) -> None:
        """Ends a request at any moment; its tokens in flight are dropped."""
        if request.status is not Status.FINISHED:
            request.finish_reason, request.metrics.finished = "abort", time.perf_counter()
            self._finish(request)

    def schedule(self) -> Schedule:
        """Picks the next step's tokens and allocates their pages. An empty schedule: nothing can be computed now."""
        plan = Plan(self.max_num_batched_tokens)
        self._unshare(plan)
        prompts = self._take_beams(plan, self._take_decodes(plan))
        if plan.sequences and len(prompts) + len(self.waiting) <= MAX_LATECOMERS:
            plan.budget = min(plan.budget, self._beside(len(plan.sequences)))
        for request in prompts:
            if plan.budget and request.status is Status.RUNNING:
                self._take(plan, request)
        if not plan.preempted:
            self._admit(plan)
        if self._stalled(plan):
            self._preempt(plan, self.running[-1])
        swaps = self.swap.hand_over(self.stats) if self.swap and plan.sequences else None
        beams = [s for s in plan.sequences if s.decode and s.request.search] if plan.beams else []
        schedule = Schedule(plan.sequences, plan.admitted, plan.tables, plan.copies, beams, swaps=swaps)
        if plan.sequences:
            self.stats.count(1, schedule.num_tokens, self.slots(self._forked))
        return schedule

    def extend(self, schedule: Schedule, num_steps: int) -> Schedule:
        """The newest schedule over `num_steps` decode steps, if nothing waits for it to end: all requests that run
        decode, no other is there, one has so many tokens to come, and pages are free. Else as it is."""
        sequences = schedule.sequences
        if num_steps == 1 or self.waiting or not sequences or schedule.num_decodes < len(sequences):
            return schedule
        if not all(r.decoding for r in self.running):
            return schedule
        steps = [min(num_steps, s.request.max_len - 1 - s.start) for s in sequences]
        missing = [self._missing_pages(s.request, n - 1) for s, n in zip(sequences, steps, strict=True)]
        if max(steps) < num_steps or sum(missing) > self.allocation.num_free(self.running):
            return schedule
        for s, n, pages in zip(sequences, steps, missing, strict=True):
            request = s.request
            if pages:
                s.new_pages = [*s.new_pages, *self._take_pages(request, pages)]
            s.num_tokens = n
            request.num_computed_tokens += n - 1
            request.num_in_flight += n - 1
        self.stats.count(num_steps - 1, sum(steps) - len(steps), self.slots(self._forked))
        return replace(schedule, num_steps=num_steps)

    def update(self, schedule: Schedule, token_ids: list[int], step: int = 0) -> list[Request]:
        """Appends the tokens that a schedule sampled, in one of its steps, one per sequence (ignored where it does not
        sample).

        Returns the requests that got a token; those now finished have freed their pages.
        """
        progressed = []
        for sequence, token_id in zip(schedule.sequences, token_ids, strict=True):
            request = sequence.request
            if not sequence.samples or request.status is Status.FINISHED or step >= max(sequence.num_tokens, 1):
                continue
            request.num_in_flight -= 1
            if request.search:
                continue  # which picks the token
            request.append(token_id)
            if request.finish_reason:
                self._finish(request)
            progressed.append(request)
        return progressed

    def _take_decodes(self, plan: Plan) -> list[Request]:
        """Takes a token of each row that decodes; returns the running requests whose prompts are still computed.

        Most of a step's host time is spent here. So what `_take` does in general is written out for one token, and
        functions are called for the rows alone that begin a page. The budget has a token for every row.
        """
        page_size, sequences, prompts = self.pool.page_size, plan.sequences, []
        for request in self.running:  # which loses requests at its end where pages run out, perhaps this one
            if not request.decoding:
                prompts.append(request)
                continue
            start, row, new_pages = request.num_computed_tokens, request.row, ()
            if start + 1 >= request.max_len:
                continue  # its last token is in flight
            if start % page_size == 0:
                new_pages = self._grow(plan, request, 1)
                if new_pages is None:
                    break
            assert row is not None
            request.num_computed_tokens = start + 1
            request.num_in_flight += 1
            sequences.append(ScheduledSequence(request, row, start, 1, True, True, new_pages))
        plan.budget -= len(sequences)
        return prompts

    def _take_beams(self, plan: Plan, requests: list[Request]) -> list[Request]:
        """Takes the token that a search has picked of each beam that has it; returns the requests that are no beams,
        and beams that are computed anew."""
        others = []
        for request in requests:
            if request.search is None:
                others.append(request)
            elif request.row is not None and not request.num_in_flight:
                if request.num_to_compute > 1:
                    others.append(request)
                elif request.num_to_compute and plan.budget:
                    self._take_beam(plan, request)
        return others

    def _take_beam(self, plan: Plan, request: Request) -> None:
        new_pages, start, row = self._grow(plan, request, 1), request.num_computed_tokens, request.row
        if new_pages is not None and row is not None:
            request.num_computed_tokens, request.num_in_flight, request.candidates = start + 1, 1, None
            plan.budget -= 1
            plan.beams = True
            plan.sequences.append(ScheduledSequence(request, row, start, 1, True, True, new_pages))

    def _beside(self, num_decodes: int) -> int:
        """Tokens of prompts in a step of so many rows that decode."""
        num_tokens = self.max_mixed_tokens
        while num_decodes > num_tokens * 3 // 4:
            num_tokens *= 2
        return num_tokens - num_decodes

    def _take(self, plan: Plan, request: Request) -> None:
        """Takes as many tokens of a prompt as the budget has, if there are pages for them."""
        start, row, num_tokens = request.num_computed_tokens, request.row, min(request.num_to_compute, plan.budget)
        new_pages = self._grow(plan, request, num_tokens)
        if new_pages is None:
            return
        assert row is not None
        request.num_computed_tokens = end = start + num_tokens
        samples = end == request.num_tokens
        if samples:
            request.num_in_flight += 1
            request.decoding, request.candidates = request.search is None, None
        if self.cache:
            self.cache.publish(request)
        plan.budget -= num_tokens
        plan.sequences.append(ScheduledSequence(request, row, start, num_tokens, False, samples, new_pages))
        if samples and request.forks:
            self._fork(plan, request)

    def _fork(self, plan: Plan, parent: Request) -> None:
        """Starts the other samples of a prompt just computed: on the same pages, the last one too if it is filled in
        part. Those for which there is no row wait, as do all in a step that preempted."""
        self._forked.append(parent)
        while parent.forks and self._free_rows and not plan.preempted:
            fork = parent.forks.pop(0)
            self._share_pages(parent, fork)
            fork.parent, fork.decoding, fork.num_in_flight = None, True, 1
            fork.metrics.first_scheduled = time.perf_counter()
            self._forked.append(fork)
            row = fork.row
            assert row is not None
            plan.admitted.append(fork)
            plan.tables.append((row, list(fork.pages)))
            plan.sequences.append(ScheduledSequence(fork, row, fork.num_computed_tokens, 0, False, True, ()))
        self._promote(parent)

    def _unshare(self, plan: Plan) -> None:
        """Copies the page that a sample is about to write to, if others have it too; the last of them keeps it.

        Oldest first, so that whoever loses its pages for a copy has none in this step.
        """
        forked, self._forked = set(self._forked), []
        for request in [r for r in self.running if r in forked] if forked else ():
            start = request.num_computed_tokens
            index = start // self.pool.page_size
            if request.status is not Status.RUNNING or start + 1 >= request.max_len or index == len(request.pages):
                continue  # writes nothing, or to a page that it does not have yet
            page = request.pages[index]
            while self.pool.num_users(page) > 1 and not self.pool.num_free and request.row is not None:
                self._preempt(plan, self.running[-1])
            if request.row is not None and self.pool.num_users(page) > 1:
                request.pages.pop()  # which is the page
                self.allocation.take(request, 1)
                self.pool.free([page])
                plan.copies.append((page, request.pages[index]))
                plan.tables.append((request.row, list(request.pages)))

    def _grow(self, plan: Plan, request: Request, num_tokens: int) -> list[tuple[int, int]] | None:
        """Allocates the pages of `num_tokens` more tokens, as (logical page, physical page).

        Preempts the newest requests until enough are free; None if the request itself was among them.
        """
        missing = self._missing_pages(request, num_tokens)
        while missing > self.allocation.num_free((request,)):
            newest = self.running[-1]
            self._preempt(plan, newest)
            if newest is request:
                return None
        return self._take_pages(request, missing)

    def _admit(self, plan: Plan) -> None:
        if not (self.waiting and self._free_rows and plan.budget):
            return
        reserved = sum(self._missing_pages(r, r.num_to_compute) for r in self.running if not r.decoding)
        while self.waiting and self._free_rows and plan.budget:
            request = self.waiting[0]
            watermark = self._watermark if self.running and not request.search else 0
            found = self.cache.find(request) if self.cache and not request.num_in_flight else []
            pages = self.pool.pages_for(request.num_tokens)
            if request.num_in_flight or not self.allocation.admit(request, found, reserved + watermark):
                return
            self.waiting.popleft()
            request.status, request.row = Status.RUNNING, heapq.heappop(self._free_rows)
            self._begin(request, found)
            others = bool(plan.sequences) and not request.search  # a beam's last token may have to be computed again
            late = bool(self.swap) and self.swap.bring_back(request, self.allocation, late=others) and others
            if request.pages:
                plan.tables.append((request.row, list(request.pages)))
            self._insert_running(request)
            plan.admitted.append(request)
            if not late:
                self._take(plan, request)
            reserved += pages - len(request.pages)
