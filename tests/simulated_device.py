"""A device without a model, whose every slot is known."""

from collections import defaultdict
from weakref import WeakKeyDictionary

from simulated_requests import token_at

from pagedjax.page_pool import NULL_PAGE
from pagedjax.schedule import Schedule, ScheduledSequence, Swapped, Swaps


class FakeDevice:
    """Page tables, last tokens and KV by slot. It learns of pages from schedules alone, as the real one does."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.page_table: dict[int, dict[int, int]] = defaultdict(dict)  # row -> logical page -> physical page
        self.last_token: dict[int, int] = {}
        self.kv: dict[tuple[int, int], int] = {}  # (physical page, offset) -> token
        self.host: WeakKeyDictionary[Swapped, list[list[int]]] = WeakKeyDictionary()  # pages of tokens

    def run(self, schedule: Schedule) -> list[list[int]]:
        """Writes each step's slots, then reads every slot that its sequences attend to; returns the next tokens."""
        if schedule.swaps:
            self._swap(schedule.swaps)
        assert len({target for _, target in schedule.copies}) == len(schedule.copies)
        before = dict(self.kv)
        for source, target in schedule.copies:
            for offset in range(self.page_size):
                self.kv[target, offset] = before.get((source, offset), -1)
        for row, pages in schedule.tables:
            self.page_table[row].update(enumerate(pages))
        for s in schedule.sequences:
            self.page_table[s.row].update(s.new_pages)
        for s in schedule.rewritten:
            assert s in schedule.sequences and s.decode and s.request.num_computed_tokens == s.start + 1
            self.page_table[s.row] = dict(enumerate(s.request.pages))
            (self.last_token[s.row],) = s.request.token_ids(s.start, s.start + 1)
        tokens = [[self._step(s, i) for s in schedule.sequences] for i in range(schedule.num_steps)]
        self._bring_back(schedule.swaps.late if schedule.swaps else [])
        return tokens

    def _swap(self, swaps: Swaps) -> None:
        offsets = range(self.page_size)
        for swapped, pages in swaps.outs:
            assert len(pages) == swapped.num_pages and NULL_PAGE not in pages
            self.host[swapped] = [[self.kv.get((page, offset), -1) for offset in offsets] for page in pages]
        self._bring_back(swaps.ins)
        for _, pages in swaps.late:  # nobody reads or writes them in the step
            self.kv.update({(page, offset): -2 for page in pages if page != NULL_PAGE for offset in offsets})

    def _bring_back(self, ins: list[tuple[Swapped, list[int]]]) -> None:
        for swapped, pages in ins:
            for page, tokens in zip(pages, self.host.pop(swapped), strict=True):
                if page != NULL_PAGE:
                    self.kv.update({(page, offset): token for offset, token in enumerate(tokens)})

    def _step(self, s: ScheduledSequence, step: int) -> int:
        if s.num_tokens == 0:
            return self._next_token(s, s.start, [])
        if not s.decode:
            token_ids = s.request.token_ids(s.start, s.start + s.num_tokens)
            return self._next_token(s, s.start, token_ids)
        return self._next_token(s, s.start + step, [self.last_token[s.row]]) if step < s.num_tokens else -1

    def _slot(self, s: ScheduledSequence, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.page_size)
        page = self.page_table[s.row][index]
        assert page == s.request.pages[index], "the row's page table names a page that the request does not own"
        return page, offset

    def _next_token(self, s: ScheduledSequence, start: int, token_ids: list[int]) -> int:
        for position, token in enumerate(token_ids, start):
            self.kv[self._slot(s, position)] = token
        end = start + len(token_ids)
        attended = [self.kv[self._slot(s, position)] for position in range(end)]
        expected = [token_at(s.request, position) for position in range(end)]
        assert attended == expected, "a slot holds another token than its own"
        self.last_token[s.row] = token_at(s.request, end)
        return self.last_token[s.row]
