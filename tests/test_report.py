"""Figures and tables are what the rows say."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import regenerate, report, tables
from experiments.common import read_rows, record
from experiments.findings import FINDINGS, NO_FIGURE, TABLES

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_in_the_pages_are_what_the_rows_say(page: Path):
    text = page.read_text(encoding="utf-8")
    assert report.MARKED.search(text) and report.filled(text) == text, "python -m experiments.report"


def test_another_row_is_another_table(tmp_path: Path, monkeypatch):
    for file in tables.RESULTS.glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = [json.loads(line) for line in (tmp_path / "fragmentation.jsonl").read_text().splitlines()]
    before = {name: table() for name, table in TABLES.items()}
    for row in rows:
        row["used"] /= 2
    (tmp_path / "fragmentation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    after = {name: table() for name, table in TABLES.items()}
    assert before["vs_vllm"] == after["vs_vllm"]
    assert before["findings"] != after["findings"] and before["published"] != after["published"]


def test_a_policy_of_one_s_own_stands_in_the_figure(tmp_path: Path, monkeypatch):
    rows = tables.rows_of("fragmentation")
    own = [row | {"policy": "my_file:Halves", "used": 0.5} for row in rows if row.get("policy") == "pow2"]
    (tmp_path / "fragmentation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + own))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    left: Any = report.FIGURES["fragmentation"]().axes[0]
    assert [text.get_text() for text in left.get_xticklabels()][-1] == "Halves"
    assert any(abs(bar.get_height() - 50) < 1e-6 for bar in left.patches)


def test_ratios_are_to_the_same_card_and_rows_without_one_beside_them_are_left_out():
    measured = [("a", 16, 10.0), ("a", 16, 12.0), ("a", 64, 22.0), ("b", 16, 100.0), ("b", 256, 50.0), ("c", 64, 1.0)]
    rows = [{"device": device, "page_size": size, "us": us, "shape": "8B"} for device, size, us in measured]
    found = [(row["device"], row["page_size"], row["us"]) for row in tables.beside(rows, "us")]
    assert found == [("a", 16, 10 / 11), ("a", 16, 12 / 11), ("a", 64, 2.0), ("b", 16, 1.0), ("b", 256, 0.5)]


def test_a_rate_lies_between_those_run_along_logarithms_of_latency():
    means = {2: [0.003, 0.005], 8: [0.04], 16: [0.4]}
    rows = [{"rate": rate, "normalized_latency_s": {"mean": mean}} for rate, found in means.items() for mean in found]
    assert tables.rate_at(rows, 0.04 / 10**0.5) == pytest.approx(5)
    assert [tables.rate_at(rows, seconds) for seconds in (0.001, 0.04, 1.0)] == [2, 8, 16]


def test_the_card_with_the_most_rows_comes_first():
    assert tables.cards({"device": device} for device in "abbcbcc" + "c") == ["c", "b", "a"]


def test_every_finding_has_its_figure_and_every_figure_its_finding():
    drawn = {path.stem for path in (ROOT / "experiments" / "figures").glob("*.png")}
    assert set(FINDINGS) - NO_FIGURE == set(report.FIGURES) - {"vs_vllm"} and drawn == set(report.FIGURES)


@pytest.mark.parametrize("name", ["fragmentation", pytest.param("page_size", marks=pytest.mark.slow)])
def test_a_figure_is_drawn_of_the_rows(name: str):
    figure = report.FIGURES[name]()
    assert all(axes.has_data() for axes in figure.axes)


def test_figures_shown_in_the_pages_are_there():
    for page in report.PAGES:
        shown = re.findall(r"!\[[^]]*\]\(([^)]+\.png)\)", page.read_text(encoding="utf-8"))
        assert shown and all((page.parent / path).is_file() for path in shown)


def test_rows_name_their_commit_and_device_and_no_folder_of_a_machine():
    for name in FINDINGS:
        rows = tables.rows_of(name)
        assert rows and all(row["commit"] and "dirty" not in row["commit"] for row in rows), name
        text = (tables.RESULTS / f"{name}.jsonl").read_text()
        assert not re.search(r'"/\w+/', text), name


def test_regeneration_names_only_experiments_that_are_there():
    names = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert set(regenerate.ANYWHERE | regenerate.ON_A_GPU) <= names and set(regenerate.SMALL) <= names
    assert set(FINDINGS) <= set(regenerate.ANYWHERE | regenerate.ON_A_GPU)


def test_rows_made_anew_replace_those_of_their_parts(tmp_path: Path):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    for path, rows in ((old, [("a", 1), ("b", 2), ("a", 3)]), (new, [("a", 4)])):
        for part, value in rows:
            record(path, {"part": part, "value": value})
    for _ in range(2):
        regenerate.replace(old, new)
        assert [(row["part"], row["value"]) for row in read_rows(old)] == [("b", 2), ("a", 4)]
    new.write_text('{"value": 5}\n')
    regenerate.replace(tmp_path / "none yet.jsonl", new)
    assert read_rows(tmp_path / "none yet.jsonl") == [{"value": 5}]


@pytest.mark.slow
def test_experiments_without_a_test_of_their_own_run_in_their_small_form():
    names = ["page_size", "sharing", "recovery", "preemption", "structured", "invariance"]
    command = [sys.executable, "-m", "experiments.regenerate", "--small", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.findall(r"^(\w+): \d+ s, exit code 0$", done.stdout, re.MULTILINE) == names
