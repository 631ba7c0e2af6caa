"""The soak runs, and tells growth from noise."""

import sys
from pathlib import Path

import pytest

from experiments import soak


@pytest.mark.slow
def test_a_small_soak_preempts_aborts_and_ends_clean(monkeypatch, capsys):
    shape = Path(__file__).parent / "golden" / "tiny" / "gqa" / "config.json"
    monkeypatch.setattr(sys, "argv", ["soak", "--small", "--shape", str(shape), "--seconds", "12", "--window", "1"])
    soak.main()  # speed on a busy machine is no matter of this test
    *windows, last = capsys.readouterr().out.splitlines()
    assert '"leaked_pages": 0' in last and '"compiled_again": 0' in last
    numbers = dict(zip(windows[-1].split()[::2], map(float, windows[-1].split()[1::2]), strict=True))
    assert numbers["aborted"] > 0 and numbers["preemptions"] > 0


@pytest.mark.parametrize(
    ("memory", "speed", "leaked", "recompiled", "ok"),
    [
        ([500] * 9, [100] * 9, 0, 0, True),
        ([300] * 3 + [500] * 6, [10] * 3 + [100] * 6, 0, 0, True),
        ([500] * 6 + [530] * 3, [100] * 9, 0, 0, False),
        ([500] * 9, [100] * 6 + [85] * 3, 0, 0, False),
        ([500] * 9, [100] * 9, 1, 0, False),
        ([500] * 9, [100] * 9, 0, 1, False),
    ],
)
def test_growth_after_the_first_third_fails(memory, speed, leaked, recompiled, ok):
    rows = [{"resident_mib": m, "tokens_per_s": s} for m, s in zip(memory, speed, strict=True)]
    assert soak.verdict(rows, leaked, recompiled)["ok"] is ok
