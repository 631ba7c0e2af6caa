"""The experiment on the KV cache's size: formula, arrays, and what fits."""

from pathlib import Path

import jax
import pytest

from experiments import kv_memory
from experiments.common import read_rows
from experiments.kv_memory import PACKAGED, PUBLIC, allocate, bytes_per_token, draw, main, model_config, trial
from pagedjax.bench import load_workload
from pagedjax.kv_cache import bytes_per_page


@pytest.mark.parametrize("model", [*PUBLIC, *PACKAGED])
def test_the_formula_is_the_engine_s(model: str):
    config = model_config(model)
    assert bytes_per_page(config, 16, "bfloat16") == 16 * bytes_per_token(config)


def test_the_published_figures_come_out():
    assert bytes_per_token(model_config("opt-13b")) == 800 * 1024
    assert 2048 * bytes_per_token(model_config("llama-13b")) / 1e9 == pytest.approx(1.7, abs=0.03)
    assert bytes_per_token(model_config("llama-65b")) == 8 * bytes_per_token(model_config("llama2-70b"))


def test_a_pool_takes_the_formula_s_bytes():
    config = model_config("llama3.2-1b")
    found = allocate(config, "pages", 10, 1 << 30)
    assert (found["pages"], found["pages_wanted"]) == (10, 10)
    assert found["array_bytes"] == found["formula_bytes"] == 11 * 16 * bytes_per_token(config)  # and the null page
    assert found["in_use_bytes"] is None  # a CPU does not say


def test_a_pool_that_does_not_fit_is_allocated_as_far_as_it_does():
    config = model_config("llama3.2-1b")
    found = allocate(config, "pages", 1000, 5 * 16 * bytes_per_token(config))
    assert (found["pages"], found["pages_wanted"]) == (4, 1000)
    assert found["array_bytes"] == 5 * 16 * bytes_per_token(config) < found["wanted_bytes"]
    nothing = allocate(config, "dense", 1, 2047 * bytes_per_token(config))
    assert nothing["pages"] == nothing["array_bytes"] == 0 and nothing["wanted_bytes"] == 2048 * bytes_per_token(config)


def test_room_is_most_of_what_the_device_has_free(monkeypatch: pytest.MonkeyPatch):
    class Device:
        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 1000, "bytes_in_use": 200}

    assert kv_memory.room(77) == 77
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert kv_memory.room(77) == 760 and kv_memory.bytes_in_use() == 200


def test_dense_rows_take_several_times_a_crowd_s_pages():
    lens = draw("sharegpt-like-1000", 256, seed=0)
    rows = {
        layout: trial({"model": "llama-13b", "layout": layout, "page_size": size}, lens, cpu_bytes=0)
        for layout, size in (("pages", 16), ("dense", 2048))
    }
    assert rows["pages"]["token_bytes"] == rows["dense"]["token_bytes"] == sum(lens) * 800 * 1024
    assert rows["pages"]["wanted_bytes"] < 1.03 * rows["pages"]["token_bytes"]
    assert rows["dense"]["wanted_bytes"] > 4 * rows["pages"]["wanted_bytes"]


def test_long_outputs_are_the_more_likely_to_be_met():
    lengths = load_workload("sharegpt-like-1000").lengths
    lens = draw("sharegpt-like-1000", 4000, seed=1)
    outputs = [output for _, output in lengths]
    by_time = sum((prompt + (output - 1) / 2) * output for prompt, output in lengths) / sum(outputs)
    assert sum(lens) / len(lens) == pytest.approx(by_time, rel=0.05)
    assert lens == draw("sharegpt-like-1000", 4000, seed=1) != draw("sharegpt-like-1000", 4000, seed=2)


def test_a_small_run_keeps_a_row_a_trial(tmp_path: Path, capsys):
    main(["--small", "--model", "llama3.2-1b", "--results", str(tmp_path / "rows.jsonl")])
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row["question"], row["layout"]) for row in rows] == [
        ("lengths", "pages"),
        ("lengths", "pages"),
        ("crowd", "pages"),
        ("crowd", "dense"),
    ]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
    assert all({"seed", "bytes_per_token", "dtype", "commit", "device"} <= row.keys() for row in rows)
