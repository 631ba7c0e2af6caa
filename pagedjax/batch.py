"""From a schedule to one packed array of integers, padded to a bucket. Host only: no jax.

Buckets: a decode step has as many rows as sequences, rounded up to a power of two, or where these lie far apart to one
of some sizes between; a mixed step has as many tokens, rounded up to a power of two. Both start at the
platform's minimum and stop at the configured maximum, itself a bucket.

Layout, all int32. Decode, [B] each: row, page row, logical page, physical page; of several steps, how many each
sequence takes. Mixed, with S = min(T, max_num_seqs)
sequences and U = T // page_size + S page-table updates: row [S], start [S], end of its tokens [S], samples [S],
sampling parameters [S, NUM_SAMPLING], page row [U], logical page [U], physical page [U], token ids [T], then the number
of decoding sequences [1].
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace

import numpy as np

from .request import Request
from .sampling_params import SamplingParams
from .schedule import Schedule, ScheduledSequence

TABLE_ROWS, MANY_TABLE_ROWS = 16, 128  # page tables that go to the device in one call
DEVICE_TOKEN = -1  # stands for the newest token of a decoding row, which the host may not know yet

# The sampling parameters of a row, one int32 each; floats keep their bits.
SAMPLING_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
SAMPLING_INTS = ("top_k", "seed_high", "seed_low", "adjusted")
NUM_SAMPLING = len(SAMPLING_FLOATS) + len(SAMPLING_INTS)


@dataclass(frozen=True)
class Bucket:
    """A padded static shape: one compilation. `num_tokens` is T; a decode bucket has one per sequence (and step)."""

    decode: bool
    num_tokens: int
    num_seqs: int
    num_page_updates: int
    num_steps: int = 1

    def __str__(self) -> str:
        steps = f"x{self.num_steps}" if self.num_steps > 1 else ""
        return f"{'decode' if self.decode else 'mixed'}-{self.num_tokens}{steps}"


class Buckets:
    """The shapes that an engine compiles."""

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        page_size: int,
        min_decode_rows: int = 1,
        min_mixed_tokens: int = 16,
        max_decode_gap: int | None = None,
    ):
        decode_sizes = _powers_of_two(min(min_decode_rows, max_num_seqs), max_num_seqs, max_decode_gap)
        mixed_sizes = _powers_of_two(min(min_mixed_tokens, max_num_batched_tokens), max_num_batched_tokens)
        self.decode = [Bucket(True, size, size, size) for size in decode_sizes]
        self.mixed = []
        for size in mixed_sizes:
            num_seqs = min(size, max_num_seqs)
            self.mixed.append(Bucket(False, size, num_seqs, size // page_size + num_seqs))

    def largest(self) -> "Buckets":
        """One shape for all steps: the largest that is not for decoding alone."""
        buckets = copy(self)
        buckets.decode, buckets.mixed = [], self.mixed[-1:]
        return buckets

    def pick(self, schedule: Schedule) -> Bucket:
        """The smallest bucket that holds the schedule."""
        if self.decode and schedule.num_decodes == len(schedule.sequences):
            bucket = next(b for b in self.decode if b.num_seqs >= len(schedule.sequences))
            return bucket if schedule.num_steps == 1 else replace(bucket, num_steps=schedule.num_steps)
        num_tokens, num_seqs = schedule.num_tokens, len(schedule.sequences)
        return next(b for b in self.mixed if b.num_tokens >= num_tokens and b.num_seqs >= num_seqs)


def _powers_of_two(smallest: int, largest: int, gap: int | None = None) -> list[int]:
    """Up to `largest`, and that; with a gap, multiples of it beyond it, and farther apart beyond 8 times as much, so
    that a bucket is never more than a quarter larger than the one before."""
    sizes = []
    size = 1 << (smallest - 1).bit_length()
    while size < largest:
        sizes.append(size)
        quarter = 1 << (size.bit_length() - 3) if size >= 4 else 1
        size += min(size, max(gap, quarter)) if gap else size
    return [*sizes, largest]


def make_batch(schedule: Schedule, bucket: Bucket, null_row: int) -> np.ndarray:
    """Packs a schedule; padding goes to the null row, whose page table holds the null page alone."""
    sections = {name: np.zeros(shape, np.int32) for name, shape in layout(bucket).items()}
    sections["row"][:] = null_row
    sections["row"][: len(schedule.sequences)] = [s.row for s in schedule.sequences]
    sections["page_row"][:] = null_row
    _fill_pages(schedule, sections)
    if not bucket.decode:
        _fill_mixed(schedule, sections)
    if bucket.num_steps > 1:
        sections["steps"][: len(schedule.sequences)] = [s.num_tokens for s in schedule.sequences]
    return np.concatenate([section.ravel() for section in sections.values()])


def layout(bucket: Bucket) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the packed array's sections, in order."""
    seqs, updates = bucket.num_seqs, bucket.num_page_updates
    pages = {"page_row": (updates,), "page_index": (updates,), "page": (updates,)}
    if bucket.decode:
        steps = {"steps": (seqs,)} if bucket.num_steps > 1 else {}
        return {"row": (seqs,), **pages, **steps}
    return {
        "row": (seqs,),
        "start": (seqs,),
        "end": (seqs,),
        "samples": (seqs,),
        "sampling": (seqs, NUM_SAMPLING),
        **pages,
        "tokens": (bucket.num_tokens,),
        "num_decodes": (1,),
    }


def _fill_pages(schedule: Schedule, sections: dict[str, np.ndarray]) -> None:
    updates = [(s.row, index, page) for s in schedule.sequences for index, page in s.new_pages]
    if updates:
        columns = np.array(updates, np.int32).T
        for name, column in zip(("page_row", "page_index", "page"), columns, strict=True):
            sections[name][: len(updates)] = column


def _fill_mixed(schedule: Schedule, sections: dict[str, np.ndarray]) -> None:
    """The device keeps the sampling parameters of decoding rows; those of prompts go with every chunk."""
    sequences, num_decodes = schedule.sequences, schedule.num_decodes
    sections["start"][: len(sequences)] = [s.start for s in sequences]
    sections["end"][: len(sequences)] = np.cumsum([s.num_tokens for s in sequences])
    sections["end"][len(sequences) :] = schedule.num_tokens
    sections["samples"][: len(sequences)] = [s.samples for s in sequences]
    sections["num_decodes"][0] = num_decodes
    prompts = sequences[num_decodes:]
    tokens = [token for s in prompts for token in s.request.token_ids(s.start, s.start + s.num_tokens)]
    sections["tokens"][:num_decodes] = DEVICE_TOKEN
    sections["tokens"][num_decodes : schedule.num_tokens] = tokens
    for i, s in enumerate(prompts, num_decodes):
        sections["sampling"][i] = pack_sampling(s.request.params, s.request.seed, s.request.adjusted)


def page_tables(
    tables: list[tuple[int, list[int]]], null_row: int, pages_per_seq: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows [TABLE_ROWS] and their page tables [TABLE_ROWS, pages_per_seq], padded with the null row's."""
    for i in range(0, len(tables), TABLE_ROWS):
        row = np.full(TABLE_ROWS, null_row, np.int32)
        values = np.zeros((TABLE_ROWS, pages_per_seq), np.int32)
        for j, (index, pages) in enumerate(tables[i : i + TABLE_ROWS]):
            row[j], values[j, : len(pages)] = index, pages
        yield row, values


def row_states(
    sequences: list[ScheduledSequence], null_row: int, pages_per_seq: int
) -> Iterator[dict[str, np.ndarray]]:
    """All that the device keeps of the rows of decoding sequences whose tokens the host knows, some at a time."""
    size = TABLE_ROWS if len(sequences) <= TABLE_ROWS else MANY_TABLE_ROWS
    for i in range(0, len(sequences), size):
        states = {
            "row": np.full(size, null_row, np.int32),
            "page_table": np.zeros((size, pages_per_seq), np.int32),
            "positions": np.zeros(size, np.int32),
            "last_token": np.zeros(size, np.int32),
            "sampling": np.zeros((size, NUM_SAMPLING), np.int32),
        }
        for j, s in enumerate(sequences[i : i + size]):
            request = s.request
            states["row"][j], states["positions"][j] = s.row, s.start
            states["page_table"][j, : len(request.pages)] = request.pages
            (states["last_token"][j],) = request.token_ids(s.start, s.start + 1)
            states["sampling"][j] = pack_sampling(request.params, request.seed, request.adjusted)
        yield states


@dataclass(frozen=True)
class PromptTarget:
    """Prompt tokens [first, first + count) of a request, and the row of a step's first token that predicts one."""

    request: Request
    wanted: int  # alternatives
    row: int
    first: int
    count: int
    tokens: np.ndarray  # i32, padded


def prompt_targets(schedule: Schedule, size: int) -> Iterator[PromptTarget]:
    """Prompt tokens whose log-probabilities a step is to give, at most `size` at a time; the token at position p is
    judged by what the step computes at p - 1."""
    row = 0
    for s in schedule.sequences:
        prompt, wanted = s.request.prompt_token_ids, s.request.params.prompt_logprobs
        last = 0 if wanted is None else min(s.start + s.num_tokens + 1, len(prompt))
        for first in range(s.start + 1, last, size):
            count = min(size, last - first)
            tokens = np.zeros(size, np.int32)
            tokens[:count] = prompt[first : first + count]
            yield PromptTarget(s.request, wanted or 0, row + first - 1 - s.start, first, count, tokens)
        row += s.num_tokens


def pack_sampling(params: SamplingParams, seed: int, adjusted: bool) -> np.ndarray:
    """A row's sampling parameters, int32 [NUM_SAMPLING]; a greedy row has temperature 0 and no truncation."""
    neutral = {"top_p": 1.0, "min_p": 0.0, "temperature": 0.0} if params.greedy else {}
    floats = [neutral.get(name, getattr(params, name)) for name in SAMPLING_FLOATS]
    top_k = 0 if params.greedy else max(params.top_k, 0)
    words = np.array([min(top_k, 2**31 - 1), 0, 0, adjusted], np.int64)
    words[1], words[2] = (seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF
    return np.concatenate([np.array(floats, np.float32).view(np.int32), words.astype(np.uint32).view(np.int32)])
