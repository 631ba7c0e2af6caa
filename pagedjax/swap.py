"""Host memory for the pages of preempted requests: who has some, what goes out and what comes back. No jax here.

Swapping is the other answer to a full pool, beside recomputation (PagedAttention, https://arxiv.org/abs/2309.06180,
section 4.5). A preempted request loses its pages at once either way. If it is swapped out, the device reads them
before the next step writes anything, so that they may be handed out again in the same schedule. When the request is
admitted again, it finds what it can in the prefix cache and gets pages of its own for the rest. These come while a
step of others runs, and it goes on in the next one, after its last computed token; what was sampled meanwhile is a
short prompt. Where nobody else computes anything, they are written before the step, and it goes on at once.

Host pages are counted, not numbered: all pages of a request go and come together, in copies of a few pages each.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .allocation import Allocation
from .page_pool import NULL_PAGE, PagePool
from .request import Request
from .schedule import SchedulerStats, Swapped, Swaps

COPY_TOKENS = 256  # of one copy: its bytes take longer than its dispatch; pages of more go one by one
BUS_BYTES_PER_S = 50e9  # PCIe Gen5, 16 lanes, large copies from and to pinned memory
COPY_SECONDS = 300e-6  # of a copy of no bytes: two launches with an argument a layer, and the waits between them
OPERATIONS_PER_S = 700e12  # dense bf16 products on one H200, as measured


class SwapCosts(NamedTuple):
    """What a model's pages weigh, and what it takes to compute them."""

    page_bytes: int  # of one page in all layers
    token_operations: float  # of one token, products with weights
    pair_operations: float  # attention of one token to another


def pages_per_copy(page_size: int) -> int:
    return max(1, COPY_TOKENS // page_size)


def swap_is_faster(costs: SwapCosts, page_size: int, num_tokens: int) -> bool:
    """Whether so many tokens' pages are sooner out and back than computed again.

    Swapping moves bytes over the bus twice, at a bandwidth that small copies do not reach; recomputing takes operations
    for every token, and attention to all before it. So few KV heads speak for swapping, as do weights and contexts that
    are large; multi-head attention and small models speak against it. The paper has recomputation win where pages are
    small, for there each page was a copy of its own, and never take over 20 % longer than swapping; here pages are
    joined to copies of COPY_TOKENS.
    """
    size = pages_per_copy(page_size)
    num_copies = -(-num_tokens // (page_size * size))
    swap = 2 * num_copies * (COPY_SECONDS + size * costs.page_bytes / BUS_BYTES_PER_S)
    operations = num_tokens * (costs.token_operations + costs.pair_operations * (num_tokens + 1) / 2)
    return swap < operations / OPERATIONS_PER_S


class SwapSpace:
    """Counts `num_pages` host pages, and knows which waiting requests have some.

    Copies are whole, so a request takes a multiple of `pages_per_copy` pages. `costs` None: every preempted request is
    swapped out for which there is room; else those whose pages are sooner swapped than computed.
    """

    def __init__(self, num_pages: int, page_size: int, page_bytes: int, costs: SwapCosts | None = None):
        self.num_pages, self.page_size, self.page_bytes, self.costs = num_pages, page_size, page_bytes, costs
        self._swapped: dict[Request, Swapped] = {}
        self._outs: list[tuple[Swapped, list[int]]] = []  # in the next schedule that computes something
        self._ins: list[tuple[Swapped, list[int]]] = []
        self._late: list[tuple[Swapped, list[int]]] = []

    @property
    def num_used(self) -> int:
        return sum(self._whole_copies(swapped.num_pages) for swapped in self._swapped.values())

    def take_out(self, request: Request, pool: PagePool, copies: Sequence[tuple[int, int]]) -> None:
        """Swaps a request out that is about to lose its pages, if there is room and it pays.

        `copies` are to be made after the swap, in the same schedule: a page that is the target of one is read where it
        comes from.
        """
        num_tokens = request.num_computed_tokens
        num_pages = pool.pages_for(num_tokens)
        if self.num_used + self._whole_copies(num_pages) > self.num_pages:
            return
        if self.costs and not swap_is_faster(self.costs, self.page_size, num_tokens):
            return
        sources = {target: source for source, target in copies}
        swapped = self._swapped[request] = Swapped(num_tokens, num_pages, request.num_resets)
        self._outs.append((swapped, [sources.get(page, page) for page in request.pages[:num_pages]]))

    def bring_back(self, request: Request, allocation: Allocation, late: bool) -> bool:
        """Gives an admitted request pages for what it had, beyond those that it has from the prefix cache, and says
        whether it had more. `late`: they come while the step runs, so that it must not read them.

        Its last token is computed again if nothing else is, as of a beam whose next token has not been picked.
        """
        swapped, num_found = self._swapped.get(request), len(request.pages)
        if swapped is None:
            return False
        reset = swapped.num_resets != request.num_resets  # the weights are others
        if reset or swapped.num_tokens <= request.num_computed_tokens:
            self.drop(request)
            return False
        del self._swapped[request]
        allocation.take(request, swapped.num_pages - num_found)
        request.num_computed_tokens = min(swapped.num_tokens, request.num_tokens - 1)
        (self._late if late else self._ins).append((swapped, [NULL_PAGE] * num_found + request.pages[num_found:]))
        return True

    def drop(self, request: Request) -> None:
        """Frees the host pages of a request, if it has any."""
        swapped = self._swapped.pop(request, None)
        if swapped is not None:
            self._outs = [out for out in self._outs if out[0] is not swapped]

    def clear(self) -> None:
        """Frees the host pages of all requests."""
        self._swapped.clear()
        self._outs = []

    def hand_over(self, stats: SchedulerStats) -> Swaps | None:
        """What is to be swapped before the step that is scheduled now, which writes to pages: counted, and then
        forgotten here."""
        if not (self._outs or self._ins or self._late):
            return None
        swaps = Swaps(self._outs, self._ins, self._late)
        self._outs, self._ins, self._late = [], [], []
        stats.count_swaps(swaps, self.page_bytes)
        return swaps

    def check_integrity(self, waiting: Iterable[Request]) -> None:
        """Host pages belong to waiting requests alone, and are no more than there are."""
        assert set(self._swapped) <= set(waiting), "a request has host pages and does not wait"
        assert self.num_used <= self.num_pages, "more host pages are used than there are"
        assert not self._ins and not self._late, "pages have come back without a step"
        assert {out for out, _ in self._outs} <= set(self._swapped.values()), "pages go out for nobody"

    def _whole_copies(self, num_pages: int) -> int:
        size = pages_per_copy(self.page_size)
        return -(-num_pages // size) * size
