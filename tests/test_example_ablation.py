"""The guide to experiments shows what is there, and what it shows runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.common import read_rows
from experiments.example_eviction import main
from experiments.fragmentation import measure, policy_class, shuffled
from pagedjax.config import EngineConfig

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
GUIDE = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
EXAMPLE = (EXPERIMENTS / "example_eviction.py").read_text(encoding="utf-8")
EXAMPLE_BLOCK, POLICY_BLOCK = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


def test_the_guide_shows_the_example_in_full():
    assert EXAMPLE_BLOCK == EXAMPLE


def test_the_example_has_30_lines_of_code():
    code = EXAMPLE.split('"""\n', 2)[1]
    assert len([line for line in code.splitlines() if line]) <= 30


def test_the_example_runs_and_the_order_matters(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--small", "--results", str(tmp_path / "rows.jsonl")])
    rows = read_rows(tmp_path / "rows.jsonl")
    rates = {
        name: [row["hit_rate"] for row in rows if row["eviction"] == name] for name in {r["eviction"] for r in rows}
    }
    assert all(len(values) == 3 for values in rates.values()) and len(rates) == 3
    assert min(rates["LeastRecentlyUsed"]) > max(rates["LowestNumber"]) > max(rates["MostRecentlyUsed"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert all({"seed", "requests", "commit", "device"} <= row.keys() for row in rows)


def test_the_policy_of_the_guide_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_file.py").write_text(POLICY_BLOCK)
    monkeypatch.syspath_prepend(tmp_path)
    policy = policy_class("my_file:Halves")
    assert EngineConfig(model="any", allocation=policy).allocation_class is policy
    lengths = shuffled("sharegpt-like-1000", 100, seed=0)
    halves, most = (measure(p, lengths, 15_700, 16) for p in (policy, policy_class("max")))
    assert halves["used"] > 1.3 * most["used"]
    monkeypatch.delitem(sys.modules, "my_file")


@pytest.mark.slow
@pytest.mark.parametrize("command", re.findall(r"^    (python -m experiments\..*? --small)$", GUIDE, re.MULTILINE))
def test_the_guide_s_commands_run(command: str, tmp_path: Path):
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS.parent), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, *command.split()[1:], "--results", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "rows.jsonl")
