"""What the scheduler decides about one step. Host only: no jax."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .request import Request


@dataclass(slots=True)
class ScheduledSequence:
    """Tokens [start, start + num_tokens) of one request.

    `decode`: the single token is on the device, in the request's row. `samples`: the step reaches the last token, so a
    new one is sampled. `new_pages`: (logical page, physical page) pairs that join the row's page table.
    """

    request: Request
    row: int
    start: int
    num_tokens: int
    decode: bool
    samples: bool
    new_pages: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Schedule:
    """One step's work: decoding sequences first, then prompts. `admitted` requests need their rows' state written;
    `tables` are rows whose page tables begin with pages that the prefix cache had.
    """

    sequences: list[ScheduledSequence]
    admitted: list[Request]
    tables: list[tuple[int, list[int]]] = field(default_factory=list)

    @cached_property
    def num_decodes(self) -> int:
        return bisect_left(self.sequences, True, key=lambda s: not s.decode)

    @cached_property
    def num_tokens(self) -> int:
        return self.num_decodes + sum(s.num_tokens for s in self.sequences[self.num_decodes :])
