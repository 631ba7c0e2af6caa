"""Buddy: runs never overlap, none is lost, and what is free merges again."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from pagedjax.buddy import Buddy

FIRST = 1


class BuddyMachine(RuleBasedStateMachine):
    """Runs are taken and given back in any order."""

    runs = Bundle("runs")

    @initialize(num_pages=st.integers(1, 70))
    def start(self, num_pages: int) -> None:
        self.buddy, self.num_pages = Buddy(FIRST, num_pages), num_pages
        self.whole = sorted(self.buddy.runs, key=lambda run: run.start)
        self.taken: list[range] = []

    @rule(target=runs, count=st.integers(1, 40))
    def take(self, count: int):
        fits, longest = self.buddy.fits(count), max(map(len, self.buddy.runs), default=0)
        run = self.buddy.take(count)
        assert fits == (run is not None) == (longest >= count)
        if run is None:
            return multiple()
        assert count <= len(run) < 2 * count and (run.start - FIRST) % len(run) == 0
        self.taken.append(run)
        return run

    @rule(run=consumes(runs))
    def give_back(self, run: range) -> None:
        self.buddy.give_back(run)
        self.taken.remove(run)
        if not self.taken:
            assert sorted(self.buddy.runs, key=lambda run: run.start) == self.whole
            assert max(map(len, self.whole)) == self.buddy.longest

    @invariant()
    def every_page_is_in_one_run(self) -> None:
        pages = [page for run in [*self.taken, *self.buddy.runs] for page in run]
        assert sorted(pages) == list(range(FIRST, FIRST + self.num_pages))

    @invariant()
    def no_two_free_halves_stand_apart(self) -> None:
        blocks = {(run.start - FIRST, len(run)) for run in self.buddy.runs}
        assert not any((start ^ size, size) in blocks for start, size in blocks)


BuddyMachine.TestCase.settings = settings(derandomize=True, deadline=None, max_examples=150)


class TestRunsAreWhole(BuddyMachine.TestCase):
    """The machine above, as a claim."""


@pytest.mark.parametrize(("num_pages", "longest"), [(1, 1), (2, 2), (3, 2), (8, 8), (100, 64)])
def test_the_longest_run_is_the_largest_power_of_two_of_pages(num_pages: int, longest: int):
    buddy = Buddy(FIRST, num_pages)
    assert buddy.longest == longest and buddy.take(longest) == range(FIRST, FIRST + longest)
    assert not buddy.fits(longest)


def test_a_run_comes_from_the_shortest_block_that_holds_it():
    buddy = Buddy(FIRST, 14)  # blocks of 8, 4 and 2
    assert buddy.take(2) == range(13, 15)
    assert buddy.take(3) == range(9, 13)
    assert buddy.take(1) == range(1, 2)
    assert sorted(map(len, buddy.runs)) == [1, 2, 4]


def test_free_pages_may_be_many_and_no_run_long():
    buddy = Buddy(FIRST, 8)
    singles = [run for _ in range(8) if (run := buddy.take(1))]
    for run in singles[::2]:
        buddy.give_back(run)
    assert len(singles) == 8 and len(buddy.runs) == 4 and not buddy.fits(2)
