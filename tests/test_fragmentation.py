"""The experiment on fragmentation: what each policy does with the slots, and a policy of one's own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.common import read_rows
from experiments.fragmentation import KINDS, PAPER_SHARES, main, measure, policy_class, shuffled
from pagedjax.allocation import ALLOCATIONS
from pagedjax.bench import load_workload

ROOT = Path(__file__).parent.parent
SLOTS = 15_700


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """By policy, of a short queue."""
    lengths = shuffled("sharegpt-like-1000", 250, seed=0)
    return {name: measure(policy, lengths, SLOTS, page_size=16) for name, policy in ALLOCATIONS.items()}


def test_shares_are_of_all_slots(rows: dict[str, dict[str, Any]]):
    for row in rows.values():
        assert sum(row[kind] for kind in KINDS) == pytest.approx(1) and min(row[kind] for kind in KINDS) >= 0
        assert row["slots"] == SLOTS // 16 * 16 and row["steps"] > 100


def test_the_paper_s_figure_2_comes_out(rows: dict[str, dict[str, Any]]):
    for policy, (used, *_) in PAPER_SHARES["sharegpt-like-1000"].items():
        assert 100 * rows[policy]["used"] == pytest.approx(used, abs=5)
    assert rows["paged"]["used"] > 0.9 and rows["paged"]["internal"] < 0.01 and rows["paged"]["external"] == 0


def test_max_runs_as_many_as_there_are_contexts_in_the_pool(rows: dict[str, dict[str, Any]]):
    assert rows["max"]["mean_running"] == rows["max"]["max_running"] == SLOTS // 2048
    running = [rows[name]["mean_running"] for name in ("max", "pow2", "oracle", "paged")]
    assert running == sorted(running) and len(set(running)) == 4


def test_all_that_the_oracle_loses_inside_runs_is_their_rounding(rows: dict[str, dict[str, Any]]):
    assert rows["oracle"]["internal"] == pytest.approx(rows["oracle"]["rounding"]) and rows["oracle"]["rounding"] > 0.2
    assert rows["max"]["rounding"] == rows["paged"]["rounding"] == 0
    assert 0 < rows["pow2"]["rounding"] < rows["pow2"]["internal"]


def test_only_paged_preempts(rows: dict[str, dict[str, Any]]):
    assert rows["paged"]["preemptions"] > 0
    assert not any(rows[name]["preemptions"] for name in ("max", "pow2", "oracle"))


def test_large_pages_leave_more_slots_empty():
    lengths = shuffled("alpaca-like-1000", 800, seed=0)
    used = [measure(ALLOCATIONS["paged"], lengths, 4000, size)["used"] for size in (8, 32, 128)]
    assert used == sorted(used, reverse=True) and used[0] > 0.9 and used[-1] < 0.6


def test_the_queue_is_the_workload_over_and_over_in_the_seed_s_order():
    first, again, other = (shuffled("alpaca-like-1000", 2000, seed) for seed in (0, 0, 1))
    assert first == again != other and sorted(first) == sorted(other)
    assert sorted(first) == sorted(2 * load_workload("alpaca-like-1000").lengths)


def test_a_queue_that_fits_at_once_is_refused():
    with pytest.raises(ValueError, match=r"requests=10: a pool of 15700 slots takes all at once; accepted: more"):
        measure(ALLOCATIONS["paged"], [(10, 10)] * 10, SLOTS, 16)


@pytest.mark.parametrize("name", ["greedy", "no_such_module:Policy", "json:loads", "json:JSONDecoder"])
def test_a_policy_that_is_none_is_refused(name: str):
    with pytest.raises(ValueError, match=rf"'{name}'.*accepted: paged, max, pow2, oracle, or module:Class"):
        policy_class(name)


MY_FILE = """
from pagedjax.allocation import Reserved

class Halves(Reserved):
    def tokens(self, request):
        half = self.max_model_len // 2
        return half if request.max_len <= half else self.max_model_len
"""


def test_a_policy_of_a_user_s_own_file_changes_the_figure(tmp_path: Path):
    (tmp_path / "my_file.py").write_text(MY_FILE)
    results = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "experiments.fragmentation", "--question", "policies", "--requests", "80"]
    command += ["--workload", "sharegpt-like-1000", "--repeat", "1", "--policy", "max", "my_file:Halves"]
    command += ["--results", str(results)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    most, halves = read_rows(results)
    assert halves["policy"] == "my_file:Halves" and "my_file:Halves" in done.stdout
    assert halves["used"] > 1.5 * most["used"] and halves["mean_running"] > most["mean_running"] == 7
    assert {"seed", "workload", "page_size", "commit", "device", "max_model_len", "requests"} <= halves.keys()


def test_the_paper_s_numbers_stand_beside_its_workload_and_nothing_else(tmp_path: Path, capsys):
    few = ["--slots", "2100", "--requests", "100", "--repeat", "2", "--policy", "paged", "--page-sizes", "16"]
    main([*few, "--results", str(tmp_path / "rows.jsonl")])
    sharegpt, alpaca, *sizes = capsys.readouterr().out.splitlines()[1:]
    assert sharegpt.split()[-2:] == ["96.3", "30.42"] and alpaca.split()[-1] == "132.44" and " 96.3 " not in alpaca
    assert [row["seed"] for row in read_rows(tmp_path / "rows.jsonl")] == [0, 1] * 4
    assert len(sizes) == 2 and not any(line.rstrip().endswith((" 96.3", "30.42", "132.44")) for line in sizes)
