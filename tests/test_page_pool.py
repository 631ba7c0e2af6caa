"""PagePool: pages are free, used or kept, and cost O(1)."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from pagedjax.page_pool import NULL_PAGE, OutOfPagesError, PagePool


class PagePoolMachine(RuleBasedStateMachine):
    """Users take, share, keep and return pages in any order, wrongly at times; `users` and `cached` are what a correct
    pool counts and remembers."""

    pages = Bundle("pages")

    @initialize(num_pages=st.integers(2, 40), page_size=st.integers(1, 8))
    def start(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.users: Counter[int] = Counter()
        self.kept: set[int] = set()
        self.pool.on_evict = self.kept.remove

    @property
    def cached(self) -> set[int]:
        return {page for page in self.kept if not self.users[page]}

    @rule(target=pages, count=st.integers(0, 12))
    def allocate(self, count: int) -> Any:
        used = sum(users > 0 for users in self.users.values())
        free, cached = self.pool.num_usable - used, self.cached
        if count > free:
            with pytest.raises(OutOfPagesError, match=f"{count} pages wanted, {free} free"):
                self.pool.allocate(count)
            return multiple()
        pages = self.pool.allocate(count)
        assert len(pages) == len(set(pages)) == count
        assert not any(self.users[page] for page in pages)
        assert len(cached & set(pages)) == max(count - (free - len(cached)), 0), "kept pages go last"
        assert not self.kept & set(pages), "nobody was told"
        self.users.update(pages)
        return pages

    @rule(target=pages, data=st.data())
    def claim(self, data: st.DataObject) -> Any:
        taken = {page for page, users in self.users.items() if users} | self.cached
        free = sorted(set(range(1, self.pool.num_pages)) - taken)
        pages = data.draw(st.lists(st.sampled_from(free), unique=True)) if free else []
        self.pool.claim(pages)
        self.users.update(pages)
        return pages

    @rule(pages=pages)
    def keep(self, pages: list[int]) -> None:
        for page in pages:
            self.pool.keep(page)
            self.kept.add(page)

    @rule(target=pages, pages=pages)
    def share(self, pages: list[int]) -> Any:
        assert self.pool.num_idle(pages) == 0
        self.pool.share(pages)
        self.users.update(pages)
        return list(pages)

    @rule(target=pages, data=st.data())
    def share_what_is_cached(self, data: st.DataObject) -> Any:
        cached = sorted(self.cached)
        pages = data.draw(st.lists(st.sampled_from(cached), unique=True)) if cached else []
        assert self.pool.num_idle(pages) == len(pages)
        self.pool.share(pages)
        self.users.update(pages)
        return pages

    @rule(pages=consumes(pages))
    def free(self, pages: list[int]) -> None:
        self.pool.free(pages)
        self.users.subtract(pages)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.kept.clear()  # and not a new set, of which the pool would know nothing

    @rule(data=st.data())
    def claim_a_page_that_is_used_or_cached(self, data: st.DataObject) -> None:
        taken = sorted({NULL_PAGE} | {page for page, users in self.users.items() if users} | self.cached)
        with pytest.raises(KeyError):
            self.pool.claim([data.draw(st.sampled_from(taken))])

    @rule(data=st.data())
    def free_a_page_that_nobody_uses(self, data: st.DataObject) -> None:
        used = {page for page, users in self.users.items() if users}
        wrong = data.draw(st.sampled_from(sorted({NULL_PAGE, *range(self.pool.num_pages + 2)} - used)))
        for operation in (self.pool.free, lambda pages: self.pool.keep(pages[0])):
            with pytest.raises(KeyError):
                operation([wrong])

    @invariant()
    def free_and_used_make_the_whole(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == sum(users > 0 for users in self.users.values())
        assert self.pool.num_references == self.users.total()
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_free + self.pool.num_used == self.pool.num_usable == self.pool.num_pages - 1
        assert not self.users[NULL_PAGE]


PagePoolMachine.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=150)


class TestUsersAreCounted(PagePoolMachine.TestCase):
    """The machine above, as a claim."""


def test_every_usable_page_can_be_handed_out_and_no_other():
    pool = PagePool(num_pages=6, page_size=4)
    assert sorted(pool.allocate(5)) == [1, 2, 3, 4, 5]
    assert pool.num_free == 0


def test_too_large_a_wish_takes_nothing():
    pool = PagePool(num_pages=4, page_size=4)
    with pytest.raises(OutOfPagesError, match="4 pages wanted, 3 free of 3"):
        pool.allocate(4)
    assert (pool.num_free, pool.num_used) == (3, 0)
    assert len(pool.allocate(3)) == 3


def test_freeing_twice_is_an_error_and_loses_no_page():
    pool = PagePool(num_pages=5, page_size=4)
    pages = pool.allocate(2)
    with pytest.raises(KeyError):
        pool.free([pages[0], pages[0]])
    pool.check_integrity()
    assert (pool.num_free, pool.num_used) == (3, 1)


def test_the_tail_of_a_sequence_is_reused_before_its_head():
    pool = PagePool(num_pages=9, page_size=4)
    pages = pool.allocate(4)
    pool.free(pages)
    assert pool.allocate(1) == pages[-1:]
    assert pool.allocate(3) == pages[2::-1]


class EndsOnly(dict[int, None]):
    """A dict that only gives and takes its last element; whatever else it is asked fails the test."""

    num_operations = 0

    def popitem(self) -> tuple[int, None]:
        self.num_operations += 1
        return super().popitem()

    def __setitem__(self, key: int, value: None) -> None:
        assert key not in self, "an element in the middle"
        self.num_operations += 1
        super().__setitem__(key, value)

    def _touched_all(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("an operation that reads or moves every free page")

    __iter__ = __getitem__ = __delitem__ = __or__ = __ior__ = __reversed__ = _touched_all
    get = pop = keys = values = items = copy = _touched_all


@pytest.mark.parametrize("num_pages", [10, 10_000])
def test_a_page_costs_one_operation_whatever_the_size_of_the_pool(num_pages: int):
    pool = PagePool(num_pages, page_size=4)
    free = pool._free = EndsOnly(pool._free)
    pages = pool.allocate(7)
    assert free.num_operations == 7
    pool.free(pages)
    assert free.num_operations == 14
    assert isinstance(pool._users, dict)  # hashed: no search either


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_a_page_that_is_filled_in_part_counts_as_one(num_tokens: int, pages: int):
    assert PagePool(num_pages=2, page_size=16).pages_for(num_tokens) == pages


@pytest.mark.parametrize(
    ("num_pages", "page_size", "message"),
    [(4, 0, "page_size=0"), (4, -1, "page_size=-1"), (1, 4, "num_pages=1"), (0, 4, "num_pages=0")],
)
def test_errors_name_the_field_and_the_value(num_pages: int, page_size: int, message: str):
    with pytest.raises(ValueError, match=message):
        PagePool(num_pages, page_size)


@pytest.mark.parametrize("broken", ["both", "lost", "null page", "kept and free", "users"])
def test_check_integrity_sees_each_kind_of_damage(broken: str):
    pool = PagePool(num_pages=5, page_size=4)
    used = pool.allocate(2)
    if broken == "both":
        pool._free[used[0]] = None
    elif broken == "lost":
        del pool._users[used[0]]
    elif broken == "null page":
        pool._users[NULL_PAGE] = 1
    elif broken == "kept and free":
        pool._kept.add(next(iter(pool._free)))
    else:
        pool._users[used[0]] = 2
    with pytest.raises(AssertionError):
        pool.check_integrity()
