"""The engine without a model: a real scheduler, requests whose outputs are known, a device whose every slot is."""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean

import pytest
from simulated_device import FakeDevice
from simulated_requests import Case, candidates_of, make_request, make_search, searched, token_at

from pagedjax.allocation import ALLOCATIONS
from pagedjax.page_pool import NULL_PAGE, PagePool
from pagedjax.prefix_cache import PrefixCache
from pagedjax.request import Request, Status
from pagedjax.schedule import Schedule
from pagedjax.scheduler import Scheduler
from pagedjax.slots import Slots
from pagedjax.swap import SwapSpace, pages_per_copy


@dataclass
class Simulation:
    """Runs a case as the engine would, and holds every step against the scheduler's contract.

    `observe` sees each schedule that is dispatched.
    """

    case: Case
    observe: Callable[[Schedule], None] = lambda schedule: None
    num_steps: int = 0
    num_idle: int = 0  # steps since the oldest request last had a token computed
    oldest: Request | None = None
    in_flight: deque[tuple[Schedule, list[list[int]]]] = field(default_factory=deque)
    num_sampled: dict[Request, int] = field(default_factory=lambda: defaultdict(int))
    slots: list[Slots] = field(default_factory=list)  # of each step that computes

    def __post_init__(self) -> None:
        case = self.case
        pool = PagePool(case.num_pages, case.page_size)
        sizes = case.max_num_seqs, case.max_num_batched_tokens, case.max_mixed_tokens
        allocation = ALLOCATIONS[case.allocation](pool, case.max_model_len)
        num_host_pages = case.swap_copies * pages_per_copy(case.page_size)
        self.swap = SwapSpace(num_host_pages, case.page_size, 1, case.swap_costs) if num_host_pages else None
        cache = PrefixCache(pool) if case.caching else None
        self.scheduler = Scheduler(pool, *sizes, cache, allocation, self.swap)
        self.device = FakeDevice(case.page_size)
        self.samples = [[make_request(i, job, j) for j in range(job.samples)] for i, job in enumerate(case.jobs)]
        self.requests = [request for samples in self.samples for request in samples]
        self.jobs = [job for job in case.jobs for _ in range(job.samples)]
        roots = zip(self.samples, case.jobs, strict=True)
        self.searches = {i: make_search(s[0], job) for i, (s, job) in enumerate(roots) if job.beams}

    def run(self) -> list[Request]:
        """Steps until every request has ended; returns them all."""
        last_arrival = max(job.arrives_at for job in self.case.jobs)
        num_tokens = sum(job.max_len * job.samples * (1 + job.beams) for job in self.case.jobs)
        most_steps = last_arrival + num_tokens * (self.case.lookahead + 1)
        while self.num_steps <= last_arrival or self.unfinished:
            assert self.num_steps <= most_steps, "requests take more steps than they have tokens"
            self.step()
        while self.in_flight:
            self.land()
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.allocation.shares or self.scheduler.stats.num_preemptions == 0
        assert self.swap is None or self.swap.num_used == 0
        assert not self.device.host, "pages stay on the host that nobody will want"
        self.scheduler.check_integrity()
        self.check_mean_slots()
        return self.requests

    @property
    def unfinished(self) -> list[Request]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    def step(self) -> None:
        """What happens from outside, then one step of the engine."""
        for i, ((request, *forks), job) in enumerate(zip(self.samples, self.case.jobs, strict=True)):
            if job.arrives_at == self.num_steps:
                self.scheduler.add(request, forks)
            left = job.abort_at is not None and job.arrives_at <= job.abort_at == self.num_steps
            if left and i in self.searches:
                self.searches[i].end(self.scheduler)
            elif left and job.abort_at is not None:
                for sample in (request, *forks)[: 1 + job.abort_at % (1 + len(forks))]:
                    self.scheduler.abort(sample)
        computed = {request: request.num_computed_tokens for request in self.unfinished}
        num_preemptions = self.scheduler.stats.num_preemptions
        schedule = self.scheduler.schedule()
        waiting = len(self.scheduler.waiting)
        self.slots += [self.scheduler.slots()] * bool(schedule.sequences)
        schedule = self.scheduler.extend(schedule, self.case.decode_steps)
        self.slots += [self.scheduler.slots()] * (schedule.num_steps - 1)
        assert schedule.num_steps in (1, self.case.decode_steps) and (schedule.num_steps == 1 or not waiting)
        preempted = self.scheduler.stats.num_preemptions > num_preemptions
        assert not schedule.admitted or not preempted
        self.check(schedule, computed)
        self.check_progress(schedule, preempted)
        self.check_slots()
        if schedule.sequences:
            self.observe(schedule)
            self.in_flight.append((schedule, self.device.run(schedule)))
        if self.in_flight and (not schedule.sequences or len(self.in_flight) > self.case.lookahead):
            self.land()
        self.num_steps += 1

    def land(self) -> None:
        """Reads the oldest step back."""
        schedule, token_ids = self.in_flight.popleft()
        before = {s.request: len(s.request.output_token_ids) for s in schedule.sequences}
        progressed = [r for i, tokens in enumerate(token_ids) for r in self.scheduler.update(schedule, tokens, i)]
        for s in schedule.sequences:
            if s.request.search:
                if s.samples and s.request.status is not Status.FINISHED:
                    s.request.candidates = candidates_of(s.request)
                continue
            self.num_sampled[s.request] += s.num_tokens if s.decode else s.samples
            assert len(s.request.output_token_ids) - before[s.request] == progressed.count(s.request)
        for search in self.searches.values():
            if not search.done and search.ready:
                search.advance(self.scheduler)
        self.scheduler.check_integrity()

    def check(self, schedule: Schedule, computed: dict[Request, int]) -> None:
        """The contract of a schedule; `computed`: how many tokens each request had in its pages before it."""
        sequences = schedule.sequences
        assert sum(s.num_tokens for s in sequences) == schedule.num_tokens
        assert schedule.num_tokens <= self.case.max_num_batched_tokens * schedule.num_steps
        assert len({s.row for s in sequences}) == len({s.request for s in sequences}) == len(sequences)
        assert all(0 <= s.row < self.case.max_num_seqs and s.row == s.request.row for s in sequences)
        assert [s.decode for s in sequences] == sorted((s.decode for s in sequences), reverse=True)
        ins, late = (schedule.swaps.ins, schedule.swaps.late) if schedule.swaps else ([], [])
        ahead = [r for r in schedule.admitted if r not in {s.request for s in sequences}]
        assert len(ahead) == len(late) and all(
            r.pages[: len(p)][-1] == p[-1] for r, (_, p) in zip(ahead, late, strict=True)
        )
        assert sequences or not late
        found = {row: len(pages) * self.case.page_size for row, pages in schedule.tables}
        written = [page for _, pages in [*ins, *late] for page in pages if page != NULL_PAGE]
        assert all(self.scheduler.pool.num_users(page) for page in written) and len(set(written)) == len(written)
        assert not {page for pair in schedule.copies for page in pair} & set(written)
        last = {pages[-1]: swapped.num_tokens for swapped, pages in ins}
        for s in sequences:
            cached = found.get(s.row, 0) if s.request in schedule.admitted else 0
            if s.request in schedule.admitted and s.start % self.case.page_size:
                cached = last.get(s.request.pages[s.start // self.case.page_size], cached)
            if s.request.search:  # whose last token may come back computed, and is computed again
                cached = min(cached, len(s.request.prompt_token_ids) + len(s.request.output_token_ids) - 1)
            forked = s.num_tokens == 0
            assert s.start == (len(s.request.prompt_token_ids) if forked else computed[s.request] + cached)
            assert not forked or (s.samples and s.request in schedule.admitted)
            assert s.num_tokens <= schedule.num_steps or not s.decode
            assert s.start + s.num_tokens < s.request.max_len, "past the length limit"
        alike = len({job.priority for job in self.case.jobs}) == 1 and not self.searches
        for requests in (self.unfinished,) if alike else (self.scheduler.running, self.scheduler.waiting):
            orders = [request.order for request in requests]
            assert orders == sorted(orders), "a younger request runs while an older one waits"
        self.scheduler.check_integrity()

    def check_slots(self) -> None:
        """What slots are used for now, against a count of every used page."""
        scheduler, size = self.scheduler, self.case.page_size
        filled: dict[int, int] = {}
        to_fill: dict[int, int] = {}
        for r in scheduler.running:
            run = getattr(scheduler.allocation, "_runs", {}).get(r, r.pages)
            for i, page in enumerate(run):
                filled[page] = min(max(r.num_computed_tokens - i * size, 0), size)
                to_fill[page] = min(max(r.max_len - i * size, 0), size)
        slots = scheduler.slots()
        assert (slots.used, slots.used + slots.reserved) == (sum(filled.values()), sum(to_fill.values()))
        assert slots.internal == len(filled) * size - sum(to_fill.values())
        assert not slots.external or (scheduler.waiting and not scheduler.allocation.shares and slots.free == 0)

    def check_progress(self, schedule: Schedule, preempted: bool) -> None:
        """The oldest request computes in every step, unless all it can do is wait for its tokens in flight.

        That takes `lookahead` steps, and as many again where the queue of steps in flight has drained and refills.
        Beams wait for each other as well, and who is swapped in for one step of the others.
        """
        progress = schedule.sequences or self.in_flight or preempted or not self.unfinished
        assert progress, "requests wait and nothing runs"
        if self.searches:
            return
        oldest = next(iter(self.unfinished), None)
        waits = oldest is not None and oldest not in {s.request for s in schedule.sequences}
        self.num_idle = self.num_idle + 1 if waits and oldest is self.oldest else int(waits)
        self.oldest = oldest
        assert self.num_idle <= 2 * self.case.lookahead + bool(self.scheduler.swap), "the oldest request starves"

    def check_mean_slots(self) -> None:
        """Samples of a single token go on sharing a page, and the counters know only for one step."""
        stats = self.scheduler.stats
        assert stats.num_steps == len(self.slots)
        if self.slots and all(job.samples == 1 or job.max_tokens > 1 for job in self.case.jobs):
            assert stats.mean_slots == pytest.approx([mean(kind) for kind in zip(*self.slots, strict=True)])

    def check_outputs(self) -> None:
        """Every request got exactly its tokens, and the device computed few that nobody wanted."""
        for i, search in self.searches.items():
            job = self.case.jobs[i]
            assert search.done and not search.beams
            if job.abort_at is None or job.abort_at < job.arrives_at:
                assert search.ended == searched(i, job).ended
        for request, job in zip(self.requests, self.jobs, strict=True):
            if job.beams:
                continue
            outputs = request.output_token_ids
            assert request.status is Status.FINISHED
            start = job.prompt_len
            assert outputs == [token_at(request, position) for position in range(start, start + len(outputs))]
            if request.finish_reason == "abort":
                assert job.abort_at is not None and len(outputs) <= job.num_outputs
                continue
            assert len(outputs) == job.num_outputs
            ended = job.end_after is not None and job.end_after <= job.max_tokens
            assert request.finish_reason == ("stop" if ended else "length")
            most = (self.case.lookahead + 1) * self.case.decode_steps - 1
            assert 0 <= self.num_sampled[request] - len(outputs) <= (most if ended else 0)
