"""Where is the KV memory lost, and how many requests fit into it, by how requests get their pages?

Question: shares of the pool's slots that hold a token (used), will hold one of the same request (reserved), will never
(internal), or are free in runs too short for the next request (external); requests that run at a time. These are
figures 2 and 13 of the PagedAttention paper (https://arxiv.org/abs/2309.06180). Page pool and scheduler are the
engine's; there is no model, and tokens are made up, so it needs no GPU.
Varied: `policies`: which pages a request gets (`pagedjax.allocation`, or a class of your own); `page_sizes`: the page
size of `paged`; both on lengths like ShareGPT's and like Alpaca's, in an order by the trial's seed.
Held: 15 700 slots (OPT-13B on an A100 of 40 GB, the paper's table 1), a context of 2048, pages of 16 (policies), all
requests in the queue at once, tokens read back at once. Means are over the steps from when a quarter of the requests
have begun to when the last one leaves the queue, so the pool is as full as the policy can have it.
Expected: on ShareGPT's lengths tokens hold over 95 % of `paged`, 38 % of `oracle`, 27 % of `pow2`, 20 % of `max`, which
are the paper's; of Alpaca's, less; large pages cost much where requests are short. `paged` runs more requests than in
the paper's figure 13, where they arrive at a rate.

    python -m experiments.fragmentation [--question policies page_sizes] [--policy paged max my_file:MyClass] [--small]

Runs are powers of two of pages. What a run is longer than was asked for (rounding) counts as internal here; the paper
must have it in external, with all that is free: its Oracle has no internal waste. The table's last columns count as
it does. Rows go to `results/fragmentation.jsonl`, one a trial.
"""

import argparse
import importlib
from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

import numpy as np

from pagedjax.allocation import ALLOCATIONS, Allocation, Reserved
from pagedjax.bench import Lengths, load_workload
from pagedjax.page_pool import PagePool
from pagedjax.request import Request
from pagedjax.sampling_params import SamplingParams
from pagedjax.schedule import SchedulerStats
from pagedjax.scheduler import Scheduler

from .common import Parser, conditions, record

POLICIES, PAGE_SIZE, PAGE_SIZES = ["max", "pow2", "oracle", "paged"], 16, [8, 16, 32, 64, 128, 256]
MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 2048, 1024, 8192
WORKLOADS = ["sharegpt-like-1000", "alpaca-like-1000"]
KINDS = ("used", "reserved", "internal", "external", "free")
HEADER = (
    f"{'workload':18} {'policy':16} page {' '.join(f'{kind:>8}' for kind in KINDS)}  running  most preempted"
    "  as the paper counts   the paper's fig. 2  fig. 13"
)

# Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention, arXiv 2309.06180.
PAPER_SHARES = {  # figure 2, percent: token state, reserved, internal, external and all that is left
    "sharegpt-like-1000": {
        "max": (20.4, 13.3, 57.3, 8.9),
        "pow2": (26.8, 17.9, 13.6, 41.6),
        "oracle": (38.2, 25.2, 0.0, 36.6),
        "paged": (96.3,),
    }
}
PAPER_RUNNING = {  # figure 13: mean number of batched requests
    "sharegpt-like-1000": {"max": 7.00, "pow2": 9.81, "oracle": 13.62, "paged": 30.42},
    "alpaca-like-1000": {"max": 7.00, "pow2": 43.24, "oracle": 72.75, "paged": 132.44},
}


def make_request(name: str, prompt: list[int], num_outputs: int) -> Request:
    """One that ends with its last output and not before."""
    params = SamplingParams(temperature=0, max_tokens=num_outputs, ignore_eos=True, detokenize=False)
    return Request(name, prompt, params, max_len=len(prompt) + num_outputs)


def run_until(scheduler: Scheduler, num_waiting: int, after_schedule: Callable[[], None] = lambda: None) -> None:
    """Steps of made-up tokens until so few requests wait."""
    while len(scheduler.waiting) > num_waiting:
        schedule = scheduler.schedule()
        if not schedule.sequences:
            raise RuntimeError(f"{type(scheduler.allocation).__name__} lets none of the waiting requests run")
        after_schedule()
        scheduler.update(schedule, [0] * len(schedule.sequences))


def rounding(scheduler: Scheduler) -> int:
    """Slots of runs beyond those that the policy asked for."""
    if not isinstance(scheduler.allocation, Reserved):
        return 0
    asked = sum(scheduler.allocation.tokens(request) for request in scheduler.running)
    return scheduler.pool.num_used * scheduler.pool.page_size - asked


def measure(policy: type[Allocation], lengths: Lengths, slots: int, page_size: int) -> dict[str, Any]:
    """Means over the steps of a run, without its beginning and without its end."""
    pool = PagePool(1 + slots // page_size, page_size)
    sizes = MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS
    scheduler = Scheduler(pool, *sizes, allocation=policy(pool, MAX_MODEL_LEN))
    for i, (prompt, output) in enumerate(lengths):
        scheduler.add(make_request(str(i), [0] * prompt, output))
    run_until(scheduler, len(lengths) * 3 // 4)
    scheduler.stats = stats = SchedulerStats()
    running: list[int] = []
    rounded: list[int] = []

    def look() -> None:
        running.append(len(scheduler.running))
        rounded.append(rounding(scheduler))

    run_until(scheduler, 0, look)
    if not running:
        raise ValueError(f"requests={len(lengths)}: a pool of {slots} slots takes all at once; accepted: more requests")
    scheduler.check_integrity()
    num_slots = pool.num_usable * page_size
    shares = {kind: value / num_slots for kind, value in stats.mean_slots._asdict().items()}
    shares |= {"rounding": mean(rounded) / num_slots}
    counts = {"mean_running": mean(running), "max_running": max(running)}
    return shares | counts | {"steps": stats.num_steps, "preemptions": stats.num_preemptions, "slots": num_slots}


def policy_class(name: str) -> type[Allocation]:
    """By its name in ALLOCATIONS, or as module:Class. ValueError if it is neither."""
    if name in ALLOCATIONS:
        return ALLOCATIONS[name]
    module, _, attribute = name.partition(":")
    accepted = f"accepted: {', '.join(ALLOCATIONS)}, or module:Class, a class like those of pagedjax.allocation"
    try:
        found = getattr(importlib.import_module(module), attribute, None) if attribute else None
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r}: {error}; {accepted}") from error
    if not (isinstance(found, type) and hasattr(found, "shares")):
        raise ValueError(f"{name!r}; {accepted}")
    return found


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What varies, but for the seed."""
    for question in args.question:
        by_policy = question == "policies"
        for workload in args.workload:
            pairs = [(p, PAGE_SIZE) for p in args.policy] if by_policy else [("paged", n) for n in args.page_sizes]
            for policy, page_size in pairs:
                yield {"question": question, "workload": workload, "policy": policy, "page_size": page_size}


def shuffled(workload: str, num_requests: int, seed: int) -> Lengths:
    """So many requests, the workload's over and over if it has fewer."""
    lengths = load_workload(workload).lengths
    chosen = np.random.default_rng(seed).permutation(num_requests) % len(lengths)
    return [lengths[i] for i in chosen]


def line(rows: list[dict[str, Any]]) -> str:
    """Medians of trials that differ in nothing but their seed; the same as the paper counts, and the paper's."""
    numbers = (*KINDS, "rounding", "mean_running", "max_running", "preemptions")
    row, first = {name: median(row[name] for row in rows) for name in numbers}, rows[0]
    workload, policy = first["workload"], first["policy"]
    shares = " ".join(f"{row[kind]:8.1%}" for kind in KINDS)
    lost = row["internal"] - row["rounding"], row["external"] + row["free"] + row["rounding"]
    ours = "/".join(f"{100 * share:.1f}" for share in (row["used"], row["reserved"], *lost))
    known = first["question"] == "policies"
    paper = "/".join(map(str, PAPER_SHARES.get(workload, {}).get(policy, ()))) if known else ""
    running = PAPER_RUNNING.get(workload, {}).get(policy, "") if known else ""
    return (
        f"{workload:18} {policy:16.16} {first['page_size']:4} {shares} {row['mean_running']:8.2f} "
        f"{row['max_running']:5.0f} {row['preemptions']:9.0f}  {ours:>19}  {paper:>19}  {running:>7}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fragmentation", __doc__, small="a shorter queue, once")
    parser.add_argument("--question", nargs="+", default=["policies", "page_sizes"], choices=["policies", "page_sizes"])
    parser.add_argument("--policy", nargs="+", default=POLICIES, help=f"{', '.join(ALLOCATIONS)}, or module:Class")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=PAGE_SIZES)
    parser.add_argument("--workload", nargs="+", default=WORKLOADS)
    parser.add_argument("--slots", type=int, default=15_700)
    parser.add_argument("--requests", type=int, default=3000, help="in the queue")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args(argv)
    if args.small:
        args.requests, args.repeat, args.page_sizes = 1000, 1, PAGE_SIZES[::5]
    try:
        args.classes = {name: policy_class(name) for name in [*args.policy, "paged"]}
    except ValueError as error:
        parser.error(f"--policy {error}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    held = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS, "requests": args.requests}
    held |= {"max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS} | conditions()
    print(HEADER)
    for case in cases(args):
        rows = []
        for seed in range(args.repeat):
            lengths = shuffled(case["workload"], args.requests, seed)
            result = measure(args.classes[case["policy"]], lengths, args.slots, case["page_size"])
            rows.append(case | {"seed": seed} | result)
            record(args.results, rows[-1] | held)
        print(line(rows), flush=True)


if __name__ == "__main__":
    main()
