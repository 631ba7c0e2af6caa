"""Which pages of the KV cache are free, how many use the others, which are kept for what they hold. No jax."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

NULL_PAGE = 0


class OutOfPagesError(RuntimeError):
    """Raised by `PagePool.allocate` when fewer pages are free than asked for; nothing was allocated."""


class PageStats(NamedTuple):
    """Pages at one moment; used, cached and free ones make the whole."""

    used: int
    shared: int  # of the used ones: by more than one request
    cached: int  # used by nobody, and kept for what they hold
    free: int
    waste: float  # share of the used pages' slots that hold no token
    saved: int  # pages that requests would use beyond these if they shared none


class Eviction(Protocol):
    """The order in which pages that are kept and that nobody uses lose what they hold."""

    def add(self, page: int) -> None:
        """Nobody uses `page` any more."""

    def remove(self, page: int) -> None:
        """Somebody uses `page` again."""

    def pop(self) -> int:
        """Takes out the page that is to go first."""
        ...

    def __len__(self) -> int: ...

    def __contains__(self, page: object, /) -> bool: ...


class LeastRecentlyUsed:
    """The page that has not been used for longest goes first."""

    def __init__(self) -> None:
        # In the order in which they were last used. (A dict walks over all that it has lost at its front to its first.)
        self._pages: OrderedDict[int, None] = OrderedDict()

    def add(self, page: int) -> None:
        self._pages[page] = None

    def remove(self, page: int) -> None:
        del self._pages[page]

    def pop(self) -> int:
        return self._pages.popitem(last=False)[0]

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: object, /) -> bool:
        return page in self._pages

    def __iter__(self) -> Iterator[int]:
        return iter(self._pages)


class PagePool:
    """Hands out the ids of `num_pages` pages of `page_size` token slots each, and counts who uses them.

    Page 0 is the null page: padding rows read and write it, nobody owns it, and it counts in `num_pages` alone. A page
    that is kept (`keep`) is not lost when its last user frees it: it can be shared again until its turn comes to be
    handed out as a free one, of which `on_evict` is told first.
    """

    def __init__(self, num_pages: int, page_size: int, eviction: Eviction | None = None):
        if page_size < 1:
            raise ValueError(f"page_size={page_size}; expected at least 1")
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}; expected at least 2: the null page and one to use")
        self.num_pages = num_pages
        self.page_size = page_size
        self.on_evict: Callable[[int], None] = lambda page: None
        self.num_references = 0  # of all users to all pages
        # A stack of which any page can be taken: page 1 goes first.
        self._free = dict.fromkeys(range(num_pages - 1, NULL_PAGE, -1))
        self._users: dict[int, int] = {}  # how many each used page has
        self._kept: set[int] = set()
        self._idle = LeastRecentlyUsed() if eviction is None else eviction  # kept, and used by nobody

    @property
    def num_usable(self) -> int:
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """That can be handed out, those kept for what they hold among them."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return len(self._users)

    @property
    def num_cached(self) -> int:
        """Kept, and used by nobody."""
        return len(self._idle)

    def stats(self, num_filled: int) -> PageStats:
        """`num_filled`: slots of used pages that hold a token."""
        used, saved = self.num_used, self.num_references - self.num_used
        shared = sum(users > 1 for users in self._users.values())
        waste = 1 - num_filled / (used * self.page_size) if used else 0.0
        return PageStats(used, shared, self.num_cached, len(self._free), waste, saved)

    def num_users(self, page: int) -> int:
        return self._users.get(page, 0)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages `num_tokens` tokens fill, the last perhaps in part."""
        return -(-num_tokens // self.page_size)

    def num_idle(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody uses: to share them takes as many free ones."""
        return sum(page in self._idle for page in pages)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, kept ones last, O(1) each. Raises OutOfPagesError, taking none, if fewer are."""
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages wanted, {self.num_free} free of {self.num_usable}")
        pages = [self._free.popitem()[0] if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        self.num_references += count
        return pages

    def claim(self, pages: Sequence[int]) -> None:
        """Takes these pages, O(1) each. KeyError if one is not free, or is kept."""
        for page in pages:
            del self._free[page]
            self._users[page] = 1
        self.num_references += len(pages)

    def share(self, pages: Sequence[int]) -> None:
        """One more user of pages that are used or kept. KeyError if one is neither."""
        for page in pages:
            if page not in self._users:
                self._idle.remove(page)
            self._users[page] = self._users.get(page, 0) + 1
        self.num_references += len(pages)

    def free(self, pages: Sequence[int]) -> None:
        """One user of a sequence's pages less, O(1) each; its tail is reused before its head."""
        idle = []
        for page in pages:
            users = self._users.pop(page)  # KeyError: freed once too often, a bug of the caller
            self.num_references -= 1
            if users > 1:
                self._users[page] = users - 1
            elif page in self._kept:
                idle.append(page)
            else:
                self._free[page] = None
        for page in reversed(idle):
            self._idle.add(page)

    def keep(self, page: int) -> None:
        """Keeps a used page, once nobody uses it, for what it holds. KeyError if nobody does now."""
        if page not in self._users:
            raise KeyError(page)
        self._kept.add(page)

    def forget(self) -> None:
        """No page is kept any more; `on_evict` is told of none."""
        while self._idle:
            self._free[self._idle.pop()] = None
        self._kept.clear()

    def check_integrity(self) -> None:
        """Every page is free, used or kept, and the null page is neither. Meant for idle moments and tests."""
        free, used = set(self._free), set(self._users)
        idle = {page for page in self._kept if page in self._idle}
        assert len(idle) == len(self._idle), "a page waits to be shared again and is not kept"
        assert not free & used and not free & idle and not used & idle, "a page is two of free, used and kept"
        assert free | used | idle == set(range(1, self.num_pages)), "a page is lost, or the null page is owned"
        assert self._kept <= used | idle, "a free page is kept"
        assert self.num_references == sum(self._users.values()), "users are counted wrongly"

    def _evict(self) -> int:
        page = self._idle.pop()
        self._kept.remove(page)
        self.on_evict(page)
        return page
