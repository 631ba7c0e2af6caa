"""How long does the host take for a decode step, the device left out?

Question: microseconds of scheduling, packing and taking back the tokens of a step. Varied: rows, tokens of context.
Held: greedy requests that all decode, page 16. Expected: well under a step of the device, 1 ms at one row and 4 ms at
256 of the 1B shape on an H200.

    python -m experiments.host_loop [--rows 1 8 64 256] [--context 32 1000]

Medians of 200 steps. On a shared machine only ratios within one run mean anything.
"""

import argparse
import time

import numpy as np

from pagedjax.batch import Buckets, make_batch
from pagedjax.page_pool import PagePool
from pagedjax.request import Request
from pagedjax.sampling_params import SamplingParams
from pagedjax.scheduler import Scheduler

STEPS, WARM_UP, PAGE_SIZE, MAX_NUM_SEQS, MAX_TOKENS = 200, 20, 16, 256, 1 << 14


def step_times(rows: int, context: int) -> np.ndarray:
    """Microseconds [STEPS, 3] of schedule, batch and update."""
    max_len = context + WARM_UP + STEPS + 2
    pool = PagePool(2 + rows * -(-max_len // PAGE_SIZE) * 2, PAGE_SIZE)
    scheduler, buckets = Scheduler(pool, MAX_NUM_SEQS, MAX_TOKENS), Buckets(MAX_NUM_SEQS, MAX_TOKENS, PAGE_SIZE)
    params = SamplingParams(temperature=0, max_tokens=max_len, ignore_eos=True, detokenize=False)
    for i in range(rows):
        scheduler.add(Request(str(i), [1] * context, params, max_len))

    def step() -> list[float]:
        times = [time.perf_counter()]
        schedule = scheduler.schedule()
        times.append(time.perf_counter())
        make_batch(schedule, buckets.pick(schedule), MAX_NUM_SEQS)
        times.append(time.perf_counter())
        scheduler.update(schedule, [7] * len(schedule.sequences))
        return np.diff([*times, time.perf_counter()]).tolist()

    while len(scheduler.running) < rows or not all(request.decoding for request in scheduler.running):
        step()
    return np.array([step() for _ in range(WARM_UP + STEPS)][WARM_UP:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="times the host's part of a decode step")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[32, 1000])
    args = parser.parse_args()
    print(f"{'rows':>5} {'context':>8} {'schedule':>9} {'batch':>7} {'update':>7} {'all':>7}  us")
    for rows in args.rows:
        for context in args.context:
            times = step_times(rows, context)
            parts = " ".join(f"{us:{width}.0f}" for us, width in zip(np.median(times, axis=0), (9, 7, 7), strict=True))
            print(f"{rows:5} {context:8} {parts} {np.median(times.sum(axis=1)):7.0f}")


if __name__ == "__main__":
    main()
