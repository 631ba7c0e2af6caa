"""Batches: few buckets, every schedule in one, and a packed array that says exactly what the schedule says."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_requests import Case, Job, cases, make_request
from simulation import Simulation

from pagedjax.batch import (
    DEVICE_TOKEN,
    NUM_SAMPLING,
    SAMPLING_FLOATS,
    SAMPLING_INTS,
    Bucket,
    Buckets,
    layout,
    make_batch,
    pack_sampling,
)
from pagedjax.page_pool import NULL_PAGE
from pagedjax.sampling_params import SamplingParams
from pagedjax.schedule import Schedule, ScheduledSequence

NULL_ROW = 8


def unpack(packed: np.ndarray, bucket: Bucket) -> dict[str, np.ndarray]:
    sizes = [math.prod(shape) for shape in layout(bucket).values()]
    parts = np.split(packed, np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(layout(bucket).items(), parts, strict=True)}


def sampling_of(packed: np.ndarray) -> dict[str, Any]:
    """The inverse of `pack_sampling`: seed as an unsigned integer of 64 bits."""
    names = (*SAMPLING_FLOATS, *SAMPLING_INTS)
    values = {name: packed[i : i + 1].view(np.float32)[0] for i, name in enumerate(SAMPLING_FLOATS)}
    values |= {name: int(packed[i]) for i, name in enumerate(names) if name in SAMPLING_INTS}
    high, low = values.pop("seed_high") % 2**32, values.pop("seed_low") % 2**32
    return {**values, "seed": high << 32 | low}


def sequence(number: int, start: int, num_tokens: int, decode: bool, pages: dict[int, int]) -> ScheduledSequence:
    """One of a prompt of ten tokens; row 3 + number."""
    request = make_request(number, Job(prompt_len=10, max_tokens=5))
    samples = decode or start + num_tokens == 10
    return ScheduledSequence(request, 3 + number, start, num_tokens, decode, samples, list(pages.items()))


@given(max_num_seqs=st.integers(1, 300), more=st.integers(0, 300), page_size=st.integers(1, 64))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_buckets_are_few_powers_of_two_up_to_the_maximum(max_num_seqs: int, more: int, page_size: int):
    max_tokens = max_num_seqs + more
    buckets = Buckets(max_num_seqs, max_tokens, page_size)
    decode, mixed = [b.num_seqs for b in buckets.decode], [b.num_tokens for b in buckets.mixed]
    assert decode == sorted(set(decode)) and mixed == sorted(set(mixed))
    assert (decode[0], decode[-1]) == (1, max_num_seqs)
    assert (mixed[0], mixed[-1]) == (min(16, max_tokens), max_tokens)
    assert all(size.bit_count() == 1 for size in decode[:-1] + mixed[:-1])
    bound = math.log2(max_num_seqs) + math.log2(max_tokens) + (2 if max_tokens < 16 else 0)
    assert len(decode) + len(mixed) <= bound


@pytest.mark.parametrize(("max_num_seqs", "rows"), [(1, [1]), (5, [5]), (8, [8]), (12, [8, 12]), (64, [8, 16, 32, 64])])
def test_small_decode_buckets_can_be_left_out(max_num_seqs: int, rows: list[int]):
    buckets = Buckets(max_num_seqs, 64, 16, min_decode_rows=8, min_mixed_tokens=64)
    assert [b.num_tokens for b in buckets.mixed] == [64]
    assert [b.num_seqs for b in buckets.decode] == rows


@pytest.mark.parametrize(("most", "rows"), [(24, [8, 16, 24]), (70, [8, 16, 32, 48, 64, 70]), (16, [8, 16]), (3, [3])])
def test_decode_buckets_lie_no_further_apart_than_the_gap(most: int, rows: list[int]):
    buckets = Buckets(most, 128, 16, min_decode_rows=8, max_decode_gap=16)
    assert [b.num_seqs for b in buckets.decode] == rows
    assert [b.num_tokens for b in buckets.mixed] == [16, 32, 64, 128]


def test_the_smallest_bucket_that_holds_a_schedule_is_picked():
    buckets = Buckets(max_num_seqs=6, max_num_batched_tokens=40, page_size=4)

    def picked(num_decodes: int, prompt_tokens: int) -> str:
        sequences = [sequence(i, 12, 1, True, {}) for i in range(num_decodes)]
        prompts = [sequence(num_decodes, 0, prompt_tokens, False, {})] if prompt_tokens else []
        return str(buckets.pick(Schedule(sequences + prompts, [])))

    assert [picked(n, 0) for n in range(1, 7)] == [f"decode-{n}" for n in (1, 2, 4, 4, 6, 6)]
    assert [picked(0, n) for n in (1, 16, 17, 32, 33, 40)] == [f"mixed-{n}" for n in (16, 16, 32, 32, 40, 40)]
    assert picked(5, 11) == "mixed-16" and picked(5, 12) == "mixed-32"


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_a_packed_batch_has_the_size_of_its_layout(page_size: int):
    buckets = Buckets(max_num_seqs=6, max_num_batched_tokens=40, page_size=page_size)
    for bucket in buckets.decode:
        assert make_batch(Schedule([], []), bucket, NULL_ROW).shape == (4 * bucket.num_seqs,)
    for bucket in buckets.mixed:
        seqs, updates = min(bucket.num_tokens, 6), bucket.num_tokens // page_size + min(bucket.num_tokens, 6)
        size = seqs * (4 + NUM_SAMPLING) + 3 * updates + bucket.num_tokens + 1
        assert make_batch(Schedule([], []), bucket, NULL_ROW).shape == (size,)


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_padding_goes_to_the_null_row_and_the_null_page(kind: str):
    buckets = Buckets(max_num_seqs=8, max_num_batched_tokens=16, page_size=4)
    bucket = getattr(buckets, kind)[-1]
    sections = unpack(make_batch(Schedule([], []), bucket, NULL_ROW), bucket)
    assert (sections.pop("row") == NULL_ROW).all() and (sections.pop("page_row") == NULL_ROW).all()
    assert (sections["page"] == NULL_PAGE).all()
    assert not any(section.any() for section in sections.values())


def test_a_decode_batch_holds_rows_and_page_updates():
    schedule = Schedule([sequence(0, 12, 1, True, {3: 7}), sequence(2, 11, 1, True, {})], [])
    bucket = Buckets(max_num_seqs=4, max_num_batched_tokens=16, page_size=4).decode[-1]
    sections = {name: part.tolist() for name, part in unpack(make_batch(schedule, bucket, NULL_ROW), bucket).items()}
    assert sections == {
        "row": [3, 5, NULL_ROW, NULL_ROW],
        "page_row": [3, NULL_ROW, NULL_ROW, NULL_ROW],
        "page_index": [3, 0, 0, 0],
        "page": [7, NULL_PAGE, NULL_PAGE, NULL_PAGE],
    }


def test_a_mixed_batch_holds_decoding_rows_then_prompts_then_padding():
    prompts = [sequence(1, 4, 3, False, {1: 9}), sequence(2, 6, 4, False, {2: 5})]
    schedule = Schedule([sequence(0, 12, 1, True, {3: 7}), *prompts], [])
    bucket = Bucket(decode=False, num_tokens=16, num_seqs=4, num_page_updates=8)
    sections = unpack(make_batch(schedule, bucket, NULL_ROW), bucket)
    ids = [s.request.prompt_token_ids for s in prompts]
    assert sections["num_decodes"].tolist() == [1]
    assert sections["row"].tolist() == [3, 4, 5, NULL_ROW]
    assert sections["start"].tolist() == [12, 4, 6, 0]
    assert sections["end"].tolist() == [1, 4, 8, 8]  # padding is empty: it ends where the last sequence does
    assert sections["samples"].tolist() == [1, 0, 1, 0]
    assert sections["tokens"].tolist() == [DEVICE_TOKEN, *ids[0][4:7], *ids[1][6:10], *[0] * 8]
    updates = np.stack([sections[name] for name in ("page_row", "page_index", "page")], axis=1)
    assert updates.tolist() == [[3, 3, 7], [4, 1, 9], [5, 2, 5], *[[NULL_ROW, 0, NULL_PAGE]] * 5]
    assert [sampling_of(row)["temperature"] for row in sections["sampling"]] == [0, 1, 1, 0]  # row 3 has its own


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_all_64_bits_of_a_seed_survive_packing(seed: int):
    assert sampling_of(pack_sampling(SamplingParams(), seed, False))["seed"] == seed % 2**64


def test_sampling_parameters_survive_packing():
    values = {
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.05,
        "presence_penalty": -1.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.1,
        "top_k": 40,
    }
    unpacked = sampling_of(pack_sampling(SamplingParams(**values), 3, True))
    assert unpacked == {**{k: np.float32(v) for k, v in values.items()}, "top_k": 40, "adjusted": 1, "seed": 3}


@pytest.mark.parametrize(("top_k", "packed"), [(-1, 0), (0, 0), (1, 1), (2**31 - 1, 2**31 - 1), (2**40, 2**31 - 1)])
def test_top_k_is_zero_when_off_and_never_wraps(top_k: int, packed: int):
    assert sampling_of(pack_sampling(SamplingParams(top_k=top_k), 0, False))["top_k"] == packed


@pytest.mark.parametrize("temperature", [0, 9e-6])
def test_a_greedy_row_is_not_truncated_but_keeps_its_penalties(temperature: float):
    params = SamplingParams(temperature=temperature, top_p=0.5, top_k=3, min_p=0.2, repetition_penalty=1.5)
    unpacked = sampling_of(pack_sampling(params, 0, True))
    neutral = {"temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0}
    assert {name: unpacked[name] for name in neutral} == neutral
    assert unpacked["repetition_penalty"] == 1.5


def check_batches(case: Case) -> Callable[[Schedule], None]:
    """An observer that packs every schedule and reads it back."""
    buckets = Buckets(case.max_num_seqs, case.max_num_batched_tokens, case.page_size)
    null_row = case.max_num_seqs

    def check(schedule: Schedule) -> None:
        bucket = buckets.pick(schedule)
        sections = unpack(make_batch(schedule, bucket, null_row), bucket)
        live = [s.row for s in schedule.sequences]
        assert sections["row"].tolist() == live + [null_row] * (bucket.num_seqs - len(live))
        updates = [(s.row, *new) for s in schedule.sequences for new in s.new_pages]
        padding = [(null_row, 0, NULL_PAGE)] * (bucket.num_page_updates - len(updates))
        columns = (sections[name].tolist() for name in ("page_row", "page_index", "page"))
        assert list(zip(*columns, strict=True)) == updates + padding
        if schedule.num_steps > 1:
            assert sections["steps"].tolist() == [s.num_tokens for s in schedule.sequences] + [0] * (
                bucket.num_seqs - len(live)
            )
        if not bucket.decode:
            tokens = [
                t if not s.decode else DEVICE_TOKEN
                for s in schedule.sequences
                for t in (s.request.token_ids(s.start, s.start + s.num_tokens) if not s.decode else [0])
            ]
            assert sections["tokens"].tolist() == tokens + [0] * (bucket.num_tokens - len(tokens))
            assert sections["num_decodes"][0] == sum(s.decode for s in schedule.sequences)

    return check


@settings(derandomize=True, deadline=None, max_examples=150)
@given(cases())
def test_every_schedule_of_a_scheduler_fits_its_bucket_and_reads_back(case: Case):
    Simulation(case, observe=check_batches(case)).run()


@given(
    runs=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=8),
    page_size=st.sampled_from([1, 2, 3, 4, 16, 64]),
)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_no_split_of_the_budget_needs_more_page_updates_than_there_is_room_for(
    runs: list[tuple[int, int]], page_size: int
):
    num_tokens = sum(count for _, count in runs)
    bucket = Buckets(len(runs), num_tokens, page_size).mixed[-1]
    new_pages = sum(-(-(start + count) // page_size) - -(-start // page_size) for start, count in runs)
    assert new_pages <= bucket.num_page_updates
