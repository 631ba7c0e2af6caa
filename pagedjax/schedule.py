"""What the scheduler decides about one step. Host only: no jax."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from .page_pool import NULL_PAGE
from .request import Request
from .slots import Slots


@dataclass(slots=True)
class ScheduledSequence:
    """Tokens [start, start + num_tokens) of one request.

    `decode`: the token is on the device, in the request's row; if there are several, a step makes the next one's.
    `samples`: the step reaches the last token, so a new one is sampled. `new_pages`: (logical page, physical page)
    pairs that join the row's page table. A fork has no tokens: it stands behind its parent and samples from the
    same last token.
    """

    request: Request
    row: int
    start: int
    num_tokens: int
    decode: bool
    samples: bool
    new_pages: Sequence[tuple[int, int]]


@dataclass(eq=False)
class Swapped:
    """Tokens [0, num_tokens) of a preempted request in host memory; `num_resets` of the prefix cache had been when
    they were computed."""

    num_tokens: int
    num_pages: int
    num_resets: int = 0


class Swaps(NamedTuple):
    """Pages that go to host memory, and those that come back, in the order of their tokens.

    All of `outs` are read before anything is written. The null page in `ins`: that one need not come. What is `late`
    comes back while the step runs, which does not read it, and is in its pages before the next one.
    """

    outs: list[tuple[Swapped, list[int]]]
    ins: list[tuple[Swapped, list[int]]]
    late: list[tuple[Swapped, list[int]]]


@dataclass(frozen=True)
class Schedule:
    """One step's work: decoding sequences first, then prompts. `admitted` requests need their rows' state written;
    `tables` are rows whose page tables begin with pages that the prefix cache had, or that were swapped in. `copies`:
    pages to be copied before, from and to. `rewritten`: decoding sequences whose rows are to be written before, as the
    host has them: beams. `num_steps`: where all decode, in one dispatch; a sequence takes part in the first
    `num_tokens` of them. `swaps` come before all else, but for what is late.
    """

    sequences: list[ScheduledSequence]
    admitted: list[Request]
    tables: list[tuple[int, list[int]]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    rewritten: list[ScheduledSequence] = field(default_factory=list)
    num_steps: int = 1
    swaps: Swaps | None = None

    @cached_property
    def num_decodes(self) -> int:
        return bisect_left(self.sequences, True, key=lambda s: not s.decode)

    @cached_property
    def num_tokens(self) -> int:
        if self.num_steps > 1:
            return sum(s.num_tokens for s in self.sequences)
        return self.num_decodes + sum(s.num_tokens for s in self.sequences[self.num_decodes :])


@dataclass
class SchedulerStats:
    """Counters since the start."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_scheduled_tokens: int = 0
    used_slots: float = 0  # these five as `Slots` has them, summed over steps
    reserved_slots: float = 0
    internal_slots: float = 0
    external_slots: float = 0
    free_slots: float = 0
    num_swap_outs: int = 0
    num_swap_ins: int = 0
    swapped_out_bytes: int = 0
    swapped_in_bytes: int = 0

    @property
    def allocated_slots(self) -> float:
        """Of pages that were used."""
        return self.used_slots + self.reserved_slots + self.internal_slots

    @property
    def mean_slots(self) -> Slots:
        """In a step."""
        sums = self.used_slots, self.reserved_slots, self.internal_slots, self.external_slots, self.free_slots
        return Slots(*(slots / max(self.num_steps, 1) for slots in sums))

    def count(self, num_steps: int, num_tokens: int, slots: Slots) -> None:
        """So many more steps and tokens, and what the slots are used for meanwhile."""
        self.num_steps += num_steps
        self.num_scheduled_tokens += num_tokens
        self.used_slots += num_steps * slots.used
        self.reserved_slots += num_steps * slots.reserved
        self.internal_slots += num_steps * slots.internal
        self.external_slots += num_steps * slots.external
        self.free_slots += num_steps * slots.free

    def count_swaps(self, swaps: Swaps, page_bytes: int) -> None:
        self.num_swap_outs += len(swaps.outs)
        ins = [*swaps.ins, *swaps.late]
        self.num_swap_ins += len(ins)
        self.swapped_out_bytes += page_bytes * sum(len(pages) for _, pages in swaps.outs)
        self.swapped_in_bytes += page_bytes * sum(len(pages) - pages.count(NULL_PAGE) for _, pages in ins)
