"""How fast is prefill before the card's power cap lowers its clock?

Question: the rate of short chains of calls after idleness, beside that of `experiments.kernels`, whose chains run hot.
Held: its inputs, bf16, one set of pages (L2 holds some of it: compute bounds these cases). Expected: above the goals on
an H100 or H200 where long chains miss them.

    python -m experiments.kernels_at_rest [--cases 'prefill-1x8192*']

A chain of three calls less a chain of one, halved: dispatch and waiting cancel. Medians of 25.
"""

import argparse
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial, reduce

import jax
import numpy as np

from pagedjax.pallas_kernels.dispatch import PAGED_PREFILL

from .kernel_trials import SCALE, Trial, all_trials, make_inputs

CHAIN, REST, REPEATS = 3, 0.15, 25  # calls, seconds, pairs of chains


def seconds_at_rest(case: Trial, op: Callable[..., jax.Array]) -> float:
    """Of one call."""
    inputs = make_inputs(case)
    op = jax.jit(partial(op, scale=SCALE))

    def chain(count: int) -> Callable[[], float]:
        jitted = jax.jit(lambda q, kv, table, lens: reduce(lambda q, _: op(q, kv, table, *lens), range(count), q))

        def run() -> float:
            time.sleep(REST)
            start = time.perf_counter()
            jitted(inputs.q, inputs.kv, inputs.tables[0], inputs.lens).block_until_ready()
            return time.perf_counter() - start

        for _ in range(2):  # compiles, and records its CUDA graph
            run()
        return run

    one, many = chain(1), chain(CHAIN)
    return float(np.median([-one() + many() for _ in range(REPEATS)])) / (CHAIN - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="prefill's rate in short chains after idleness")
    parser.add_argument("--cases", default="prefill-1x8192*,prefill-4x2048-32/8-p16-d128", help="names or patterns")
    parser.add_argument("--small", action="store_true", help="a tiny case, XLA")
    args = parser.parse_args()
    known = [Trial("prefill", 2, 64, 4, 2, 16, 64)] if args.small else all_trials()
    patterns = ["*"] if args.small else args.cases.split(",")
    print(jax.devices()[0].device_kind)
    for case in (c for c in known if c.kind == "prefill" and any(fnmatchcase(c.name, p) for p in patterns)):
        seconds = seconds_at_rest(case, PAGED_PREFILL["xla" if args.small else "mosaic"])
        print(f"{case.name:31} {seconds * 1e6:8.1f} us {case.work / seconds:6.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
