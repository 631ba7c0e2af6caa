"""The kernels' benchmark runs where there is no GPU, and its goals follow the card."""

import sys

import pytest

from experiments import kernels
from experiments.kernel_trials import GOAL_COPY, GOAL_DEVICE, all_trials


@pytest.mark.slow
def test_small_trials_run_and_are_right(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", "--small"])
    kernels.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "xla" in line]
    assert [row[0].split("-")[0] for row in rows] == ["decode", "prefill"]
    assert all(row[-2] != "wrong" and float(row[-1]) < kernels.MAX_ERROR for row in rows)


def test_names_of_trials_are_unique_and_unknown_ones_refused(monkeypatch, capsys):
    names = [trial.name for trial in all_trials()]
    assert len(names) == len(set(names))
    monkeypatch.setattr(sys, "argv", ["kernels", "--small", "--cases", "decode-*,none-*"])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "accepted: decode-2x64" in capsys.readouterr().err


def test_a_decode_goal_allows_the_same_time_beyond_the_bytes_on_every_card():
    for trial in all_trials():
        assert trial.goal_on(GOAL_DEVICE, 1.0) == trial.goal
        for copy in (2.0, 3.0):
            goal = trial.goal_on("another", copy)
            if trial.goal is None or goal is None or trial.kind == "prefill":
                assert goal == trial.goal
            else:
                bytes_here, bytes_there = (trial.work / rate * 1e6 for rate in (copy, GOAL_COPY))
                assert goal - bytes_here == pytest.approx(trial.goal - bytes_there, abs=0.1)
