"""A buddy allocator: contiguous runs of page ids. Host only: no jax."""


class Buddy:
    """Hands out runs of the pages [first, first + num_pages), a power of two of them each.

    A block splits into halves, which are buddies, until one is as short as can be; one that comes back merges with its
    buddy if that is free, and so on. All in O(log n). (Knuth, The Art of Computer Programming, volume 1, 2.5.)
    """

    def __init__(self, first: int, num_pages: int):
        self.first = first
        self._starts: list[dict[int, None]] = []  # of free blocks of 1, 2, 4... pages, counted from `first`
        for order in range(num_pages.bit_length()):
            longer = num_pages >> (order + 1) << (order + 1)  # blocks come first
            self._starts.append({longer: None} if num_pages >> order & 1 else {})
        self.longest = 1 << (len(self._starts) - 1)  # run where all is free

    @property
    def runs(self) -> list[range]:
        """That are free."""
        first = self.first
        return [range(first + s, first + s + (1 << order)) for order, starts in enumerate(self._starts) for s in starts]

    def fits(self, count: int) -> bool:
        """Whether a run of so many pages is free."""
        return any(self._starts[_order(count) :])

    def take(self, count: int) -> range | None:
        """A run of `count` pages, rounded up to a power of two; None if none is free."""
        wanted = _order(count)
        order = next((i for i in range(wanted, len(self._starts)) if self._starts[i]), None)
        if order is None:
            return None
        start, _ = self._starts[order].popitem()
        while order > wanted:
            order -= 1
            self._starts[order][start + (1 << order)] = None
        return range(self.first + start, self.first + start + (1 << wanted))

    def give_back(self, run: range) -> None:
        """One that `take` has returned."""
        start, order = run.start - self.first, _order(len(run))
        while (buddy := start ^ (1 << order)) in self._starts[order]:
            del self._starts[order][buddy]
            start &= buddy
            order += 1
        self._starts[order][start] = None


def _order(count: int) -> int:
    """Of the shortest block of at least `count` pages: the logarithm of its size."""
    return (count - 1).bit_length()
