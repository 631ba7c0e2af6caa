"""Does the order in which cached pages are evicted matter for how much of the prompts the prefix cache finds?

Varied: the eviction: least recently used, most recently used, lowest page number, which is as good as no order.
Held: 32 prefixes of 256 tokens, popular by Zipf's law, before 32 own tokens and 8 outputs; a pool for half of them.
Expected: least recently used wins, and most recently used loses to no order: a request's head is let go last, so it is
evicted first, and the pages behind it can no longer be found.

    python -m experiments.example_eviction [--small]
"""

import numpy as np

from pagedjax.page_pool import LeastRecentlyUsed, PagePool
from pagedjax.prefix_cache import PrefixCache
from pagedjax.scheduler import Scheduler

from .common import Parser, conditions, record
from .fragmentation import make_request, run_until


class MostRecentlyUsed(LeastRecentlyUsed):
    def pop(self) -> int:
        return self._pages.popitem(last=True)[0]


class LowestNumber(LeastRecentlyUsed):
    def pop(self) -> int:
        self.remove(page := min(self))
        return page


def hit_rate(eviction: type[LeastRecentlyUsed], seed: int, num_requests: int) -> float:
    cache = PrefixCache(PagePool(257, 16, eviction()))
    scheduler = Scheduler(cache.pool, 4, 1024, cache=cache)
    for i, prefix in enumerate(np.random.default_rng(seed).zipf(1.3, num_requests) % 32):
        scheduler.add(make_request(str(i), [prefix] * 256 + [1000 + i] * 32, 8))
    run_until(scheduler, 0)
    return cache.stats.hit_rate


def main(argv: list[str] | None = None) -> None:
    args = Parser("example_eviction", __doc__).parse_args(argv)
    held = {"requests": 200 if args.small else 2000} | conditions()
    for eviction in (LeastRecentlyUsed, MostRecentlyUsed, LowestNumber):
        rates = [hit_rate(eviction, seed, held["requests"]) for seed in range(3)]
        for seed, rate in enumerate(rates):
            record(args.results, {"eviction": eviction.__name__, "seed": seed, "hit_rate": rate} | held)
        print(f"{eviction.__name__:18} {min(rates):6.1%} to {max(rates):6.1%}", flush=True)


if __name__ == "__main__":
    main()
