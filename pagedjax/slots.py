"""Where the slots of the pool are lost: the kinds of waste of the PagedAttention paper (arXiv 2309.06180, figure 2)."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .allocation import Allocation
from .page_pool import PagePool
from .request import Request


class Slots(NamedTuple):
    """All slots of the pool but the null page's, at one moment or as means over steps."""

    used: float  # hold a token, or will when the steps in flight have run
    reserved: float  # will hold one of the same request, up to its length limit
    internal: float  # in a page or run of a request that will never fill them
    external: float  # free, and of no use to the request that waits first, since no run is long enough
    free: float


def count_slots(
    pool: PagePool,
    allocation: Allocation,
    running: Sequence[Request],
    sharing: Iterable[Request],
    first_waiting: Request | None,
) -> Slots:
    """`sharing`: of the running requests, those among which others may share a page that is filled in part.

    A request's last token counts as one that it will hold, though its K and V are never needed.
    """
    size, all_used = pool.page_size, pool.num_used * pool.page_size
    used = sum([r.num_computed_tokens for r in running]) - (pool.num_references - pool.num_used) * size
    seen = set()
    for request in sharing:
        filled = request.num_computed_tokens % size
        if filled:
            used += size - filled if request.pages[-1] in seen else 0
            seen.add(request.pages[-1])
    internal = allocation.num_internal()
    external = size * (allocation.num_unusable(first_waiting) if first_waiting else 0)
    return Slots(used, all_used - used - internal, internal, external, pool.num_free * size - external)
