"""The experiment on page sizes: what the prefix cache finds, by the scheduler alone."""

from argparse import Namespace
from itertools import pairwise

import numpy as np

from experiments.page_size import prefix


def found(page_size: int) -> list[tuple[float, float]]:
    """Of each seed the share of prompt tokens found, and what could be."""
    sizes = {"repeat": 3, "rows": 256, "max_tokens": 2048, "requests": 200}
    args = Namespace(workload=["alpaca-like-1000"], small=False, **sizes)
    return [(row["hit_rate"], row["possible_hit_rate"]) for row in prefix(page_size, args)]


def test_pages_of_one_token_find_all_that_could_be():
    for hit_rate, possible in found(1):
        assert hit_rate >= possible > 0.3  # prefixes that begin alike by chance add to it


def test_larger_pages_find_less():
    rates = [np.array(found(size)) for size in (1, 8, 32, 128)]
    assert all((finer[:, 0] > coarser[:, 0]).all() for finer, coarser in pairwise(rates))
    assert all((of[:, 1] == rates[0][:, 1]).all() for of in rates), "the same requests"
