"""The gap between sampler and trainer: what is counted, and that float32 has next to none."""

import sys

import numpy as np
import pytest

from experiments import logprob_gap
from experiments.common import read_rows
from experiments.logprob_gap import gap, until_parted
from pagedjax.rollout import RolloutBatch


def test_a_gap_is_that_of_the_tokens_in_the_mask():
    sampler, trainer = np.log([[0.5, 0.2, 0.3]]), np.log([[0.25, 0.9, 0.3]])
    found = gap(sampler, trainer, np.array([[True, False, True]]))
    assert found["mean"] == pytest.approx(np.log(2) / 2) and found["most"] == pytest.approx(np.log(2))
    assert found["differing"] == 0.5 and found["tokens"] == 2 and found["ratio"] == pytest.approx(0.75)
    assert found["kl"] == pytest.approx((0.5 - 1 + np.log(2)) / 2)


def test_tokens_are_compared_up_to_where_they_part():
    def batch(tokens: list[int], length: int) -> RolloutBatch:
        mask = np.arange(6) < length
        other = np.zeros((1, 6))
        return RolloutBatch(np.array([tokens]), mask[None], (mask & (np.arange(6) > 1))[None], *[other] * 5)

    one, other = batch([4, 5, 6, 7, 8, 9], 6), batch([4, 5, 6, 7, 1, 9], 6)
    assert until_parted(one, other).tolist() == [[False, False, True, True, False, False]]
    assert until_parted(one, batch([4, 5, 6, 7, 8, 9], 3)).sum() == 1


def run(tmp_path, monkeypatch, *options: str) -> dict[tuple[bool, str], dict]:
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["logprob_gap", "--small", "--results", str(path), *options])
    logprob_gap.main()
    return {(row["invariant"], row["pair"]): row for row in read_rows(path)}


def test_float32_agrees_within_1e_4_and_invariance_to_the_last_bit(tmp_path, monkeypatch):
    rows = run(tmp_path, monkeypatch, "--dtype", "float32", "--invariant", "1")
    assert len(rows) == 4 and all(row["most"] < 1e-4 for row in rows.values())
    assert rows[True, "crowd/half"]["differing"] == 0 and rows[True, "crowd/half"]["tokens"] == 20
    assert rows[True, "decode/dense"]["tokens"] == 40


@pytest.mark.slow
def test_bfloat16_is_further_apart_but_not_far(tmp_path, monkeypatch):
    rows = run(tmp_path, monkeypatch, "--dtype", "bfloat16")
    assert 1e-5 < rows[False, "decode/dense"]["mean"] < 0.05 and rows[False, "decode/dense"]["kl"] < 1e-3
