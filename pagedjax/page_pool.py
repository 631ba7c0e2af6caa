"""Which pages of the KV cache are free, and who owns the others. Host only: no jax."""

NULL_PAGE = 0


class OutOfPagesError(RuntimeError):
    """Raised by `PagePool.allocate` when fewer pages are free than asked for; nothing was allocated."""


class PagePool:
    """Hands out the ids of `num_pages` pages of `page_size` token slots each.

    Page 0 is the null page: padding rows read and write it, nobody owns it, and it counts in `num_pages` alone.
    """

    def __init__(self, num_pages: int, page_size: int):
        if page_size < 1:
            raise ValueError(f"page_size={page_size}; expected at least 1")
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}; expected at least 2: the null page and one to use")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # a stack: page 1 goes first
        self._used: set[int] = set()

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, O(1) each. Raises OutOfPagesError, taking none, if there are fewer."""
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages wanted, {len(self._free)} free of {self.num_usable}")
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Gives a sequence's pages back, O(1) each; its tail is reused before its head."""
        for page in pages:
            self._used.remove(page)  # KeyError: freed twice, a bug of the caller
            self._free.append(page)

    def check_integrity(self) -> None:
        """Every page is free or used, never both, and the null page is neither. Meant for idle moments and tests."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & self._used, "a page is both free and used"
        assert free | self._used == set(range(1, self.num_pages)), "a page is lost, or the null page is owned"
