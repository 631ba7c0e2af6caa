"""How long does the host take for a step, the device left out?

Question: microseconds of scheduling, packing and taking back the tokens of a step. Varied: rows, tokens of context; or
a workload. Held: greedy requests, page 16; rows that all decode, or a workload's requests, which all come at once.
Expected: well under a step of the device, 1 ms at one row and 4 ms at 1000 of the 1B shape on an H200.

    python -m experiments.host_loop [--rows 1 64 256 1000] [--context 32 1000] [--workload alpaca-like-1000]

Medians over steps. On a shared machine only ratios within one run mean anything.
"""

import argparse
import time

import numpy as np

from pagedjax.batch import Buckets, make_batch
from pagedjax.bench import load_workload
from pagedjax.config import platform_defaults
from pagedjax.page_pool import PagePool
from pagedjax.request import Request
from pagedjax.sampling_params import SamplingParams
from pagedjax.scheduler import Scheduler

STEPS, WARM_UP, PAGE_SIZE = 200, 20, 16
GPU = platform_defaults("gpu")
Lengths = list[tuple[int, int]]


class Loop:
    """A scheduler with requests, and no device."""

    def __init__(self, lengths: Lengths):
        pages = sum(-(-sum(pair) // PAGE_SIZE) for pair in lengths)
        sizes = GPU.max_num_seqs, GPU.max_num_batched_tokens, GPU.max_mixed_tokens
        self.scheduler = Scheduler(PagePool(2 * pages, PAGE_SIZE), *sizes)
        self.buckets = Buckets(GPU.max_num_seqs, GPU.max_num_batched_tokens, PAGE_SIZE, *GPU.bucket_limits)
        for i, (prompt, output) in enumerate(lengths):
            params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
            self.scheduler.add(Request(str(i), [1] * prompt, params, prompt + output))

    def step(self) -> tuple[bool, list[float]]:
        """Whether it was a decode step, and the microseconds of schedule, batch and update."""
        times = [time.perf_counter()]
        schedule = self.scheduler.schedule()
        times.append(time.perf_counter())
        bucket = self.buckets.pick(schedule)
        make_batch(schedule, bucket, GPU.max_num_seqs)
        times.append(time.perf_counter())
        self.scheduler.update(schedule, [7] * len(schedule.sequences))
        return bucket.decode, (np.diff([*times, time.perf_counter()]) * 1e6).tolist()


def decode_steps(rows: int, context: int) -> list[list[float]]:
    """Of `rows` requests that all decode."""
    loop = Loop([(context, WARM_UP + STEPS + 2)] * rows)
    while len(loop.scheduler.running) < rows or not all(request.decoding for request in loop.scheduler.running):
        loop.step()
    return [loop.step()[1] for _ in range(WARM_UP + STEPS)][WARM_UP:]


def workload_steps(name: str) -> dict[str, list[list[float]]]:
    """Of a workload from its first step to its last, by kind."""
    loop, steps = Loop(load_workload(name).lengths), {"decode": [], "mixed": []}
    while loop.scheduler.running or loop.scheduler.waiting:
        decode, times = loop.step()
        steps["decode" if decode else "mixed"].append(times)
    return steps


def show(label: str, steps: list[list[float]]) -> None:
    if steps:
        times = np.array(steps)
        parts = " ".join(f"{us:9.0f}" for us in (*np.median(times, axis=0), np.median(times.sum(axis=1))))
        print(f"{label:40} {len(steps):6} {parts}")


def main() -> None:
    parser = argparse.ArgumentParser(description="times the host's part of a step")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 64, 256, 1000])
    parser.add_argument("--context", type=int, nargs="+", default=[32, 1000])
    parser.add_argument("--workload", nargs="*", default=["alpaca-like-1000"])
    args = parser.parse_args()
    print(f"{'':40} {'steps':>6} {'schedule':>9} {'batch':>9} {'update':>9} {'all':>9}  us")
    for rows in args.rows:
        for context in args.context:
            show(f"{rows} rows, context {context}", decode_steps(rows, context))
    for name in args.workload:
        for kind, steps in workload_steps(name).items():
            show(f"{name}, {kind}", steps)


if __name__ == "__main__":
    main()
