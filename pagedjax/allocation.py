"""Which pages requests get, and when: on demand from anywhere, or one run each when they are admitted. No jax.

The reservations are the baselines of the PagedAttention paper (arXiv 2309.06180, section 6.1): Orca (Max), (Pow2) and
(Oracle), which keep a sequence's KV cache in contiguous memory from a buddy allocator. They run in the same engine on
the same kernels, so what differs is memory alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from .buddy import Buddy
from .page_pool import NULL_PAGE, PagePool
from .request import Request


class Allocation(Protocol):
    """Gives requests their pages. A request's `pages` are those that its tokens fill, in order; what else may be held
    for it is known here alone, and counts in the pool as used."""

    shares: ClassVar[bool]  # whether requests may have pages in common: cached prefixes, and samples of one prompt

    def __init__(self, pool: PagePool, max_model_len: int) -> None: ...

    def check(self, request: Request) -> None:
        """Raises ValueError if the request could never run."""

    def admit(self, request: Request, found: Sequence[int], spare: int) -> bool:
        """Whether a request can start that shares `found` pages and leaves `spare` free; takes what it reserves."""
        ...

    def num_free(self, requests: Sequence[Request]) -> int:
        """Pages that these running requests could take together."""
        ...

    def take(self, request: Request, count: int) -> None:
        """Appends the next `count` of a running request's pages."""

    def release(self, request: Request) -> None:
        """Takes back all that a request has."""

    def num_internal(self) -> int:
        """Slots of used pages that no request will ever fill."""
        ...

    def num_unusable(self, request: Request) -> int:
        """Free pages of no use to a request that waits, since no run of them is long enough."""
        ...

    def check_integrity(self, running: Sequence[Request]) -> None:
        """The pool's used pages are exactly those of running requests."""


class Paged:
    """A page when the one before it is full, from anywhere in the pool."""

    shares: ClassVar[bool] = True

    def __init__(self, pool: PagePool, max_model_len: int | None = None):
        self.pool = pool
        self._unfilled: dict[int, int] = {}  # slots beyond the length limit, of last pages that have such

    def check(self, request: Request) -> None:
        pages = self.pool.pages_for(request.max_len)
        if pages > self.pool.num_usable:
            raise ValueError(
                f"request {request.request_id!r} may reach {request.max_len} tokens, {pages} pages of "
                f"{self.pool.page_size}; the pool has {self.pool.num_usable}"
            )

    def admit(self, request: Request, found: Sequence[int], spare: int) -> bool:
        pages = self.pool.pages_for(request.num_tokens)
        return pages - len(found) + self.pool.num_idle(found) <= self.pool.num_free - spare

    def num_free(self, requests: Sequence[Request]) -> int:
        return self.pool.num_free

    def take(self, request: Request, count: int) -> None:
        pages = request.pages
        pages += self.pool.allocate(count)
        unfilled = len(pages) * self.pool.page_size - request.max_len
        if unfilled > 0:
            self._unfilled[pages[-1]] = unfilled

    def release(self, request: Request) -> None:
        self.pool.free(request.pages)
        for page in request.pages[-1:]:
            if not self.pool.num_users(page):
                self._unfilled.pop(page, None)

    def num_internal(self) -> int:
        return sum(self._unfilled.values())

    def num_unusable(self, request: Request) -> int:
        return 0

    def check_integrity(self, running: Sequence[Request]) -> None:
        pages = [page for r in running for page in r.pages]
        assert len(pages) == self.pool.num_references, "a page's users are not those who have it"
        assert len(set(pages)) == self.pool.num_used, "a page is used by nobody"
        unfilled = {r.pages[-1]: len(r.pages) * self.pool.page_size - r.max_len for r in running}
        assert {p: n for p, n in unfilled.items() if n > 0} == self._unfilled, "slots never filled are counted wrongly"


class Reserved(ABC):
    """One contiguous run for all tokens that `tokens` says, rounded up to a power of two of pages.

    A request waits until there is such a run, and once it has one never loses it.
    """

    shares: ClassVar[bool] = False

    def __init__(self, pool: PagePool, max_model_len: int):
        self.pool, self.max_model_len = pool, max_model_len
        self._free = Buddy(NULL_PAGE + 1, pool.num_usable)
        self._runs: dict[Request, range] = {}
        self._unfilled: dict[Request, int] = {}  # slots of a run beyond its request's length limit

    @abstractmethod
    def tokens(self, request: Request) -> int:
        """For how many a request reserves slots, its `max_len` at least."""

    def check(self, request: Request) -> None:
        tokens = self.tokens(request)
        pages = self.pool.pages_for(tokens)
        if tokens < request.max_len:
            raise ValueError(
                f"{type(self).__name__}.tokens is {tokens} for request {request.request_id!r}, which may reach "
                f"{request.max_len}; accepted: at least as many"
            )
        if pages > self._free.longest:
            raise ValueError(
                f"request {request.request_id!r} reserves {tokens} tokens, a run of {pages} pages of "
                f"{self.pool.page_size}; the longest in a pool of {self.pool.num_usable} has {self._free.longest}"
            )

    def admit(self, request: Request, found: Sequence[int], spare: int) -> bool:
        run = self._free.take(self.pool.pages_for(self.tokens(request)))
        if run is None:
            return False
        self.pool.claim(run)
        self._runs[request] = run
        self._unfilled[request] = len(run) * self.pool.page_size - request.max_len
        return True

    def num_free(self, requests: Sequence[Request]) -> int:
        return sum(len(self._runs[r]) - len(r.pages) for r in requests)

    def take(self, request: Request, count: int) -> None:
        first = len(request.pages)
        request.pages += self._runs[request][first : first + count]

    def release(self, request: Request) -> None:
        del self._unfilled[request]
        run = self._runs.pop(request)
        self.pool.free(run)
        self._free.give_back(run)

    def num_internal(self) -> int:
        return sum(self._unfilled.values())

    def num_unusable(self, request: Request) -> int:
        return 0 if self._free.fits(self.pool.pages_for(self.tokens(request))) else self.pool.num_free

    def check_integrity(self, running: Sequence[Request]) -> None:
        assert self._runs.keys() == set(running), "a run is lost, or a request has none"
        assert all([*self._runs[r][: len(r.pages)]] == r.pages for r in running), "a page from outside of the run"
        pages = [page for run in [*self._runs.values(), *self._free.runs] for page in run]
        assert sorted(pages) == list(range(NULL_PAGE + 1, self.pool.num_pages)), "runs overlap, or a page is in none"
        used = sum(map(len, self._runs.values()))
        assert used == self.pool.num_used == self.pool.num_references, "the pool counts other pages as used"


class Max(Reserved):
    """As much as any request could need. The paper's Orca (Max)."""

    def tokens(self, request: Request) -> int:
        return self.max_model_len


class Pow2(Reserved):
    """The next power of two of its output's length, at most twice what is needed. The paper's Orca (Pow2)."""

    def tokens(self, request: Request) -> int:
        prompt = len(request.prompt_token_ids)
        return min(prompt + (1 << (request.max_len - prompt - 1).bit_length()), self.max_model_len)


class Oracle(Reserved):
    """The length limit, which is the final length where nothing but the limit ends a request, as with ignore_eos: the
    engine cannot know another one ahead. The paper's Orca (Oracle)."""

    def tokens(self, request: Request) -> int:
        return request.max_len


ALLOCATIONS: dict[str, type[Allocation]] = {"paged": Paged, "max": Max, "pow2": Pow2, "oracle": Oracle}
