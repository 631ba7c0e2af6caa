"""The comparison with transformers, with stand-ins for it and torch: what is asked of it, and what is made of it."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from helpers import load_tiny, make_engine

from experiments import vs_hf
from experiments.common import read_rows
from pagedjax.bench import package_data

ROOT = Path(__file__).parent.parent
TORCH = """
from types import SimpleNamespace as Namespace

__version__, float32, bfloat16, long, dtype = "0", "torch.float32", "torch.bfloat16", "long", str
cuda = Namespace(is_available=lambda: False)
inference_mode = lambda: lambda function: function

class OutOfMemoryError(Exception):
    pass

class device:
    def __init__(self, type): self.type = type
    def __enter__(self): pass
    def __exit__(self, *error): pass

class tensor:
    def __init__(self, values, device):
        self.shape, self.values = (len(values), len(values[0])), values
    def __getitem__(self, key): return self
    def __setitem__(self, key, value): pass

def manual_seed(seed): pass
def zeros(*shape, dtype, device): return tensor([[0] * shape[1]] * shape[0], device) if len(shape) == 2 else None
ones = zeros
"""
TRANSFORMERS = """
import sys, torch
from types import SimpleNamespace as Namespace

__version__, ROOM = "0", 5
LlamaConfig = Namespace(from_json_file=lambda path: Namespace(vocab_size=50, num_key_value_heads=1, head_dim=1))
GenerationConfig = Namespace
DynamicCache = lambda config: Namespace(layers=[])

class StaticCache:
    def __init__(self, config, max_cache_len): self.length = max_cache_len
    def reset(self): print("reset", self.length, file=sys.stderr)

class Model:
    device, dtype, generation_config = torch.device("cpu"), "float32", None
    def __init__(self, config, attention):
        self.config = config
        config._attn_implementation = attention
    def eval(self): return self
    def __call__(self, ids, **arguments): self.need(ids)
    def need(self, ids):
        if ids.shape[0] > ROOM:
            raise torch.OutOfMemoryError("no room\\nfor more")
    def generate(self, ids, attention_mask, **arguments):
        self.need(ids)
        arguments.pop("past_key_values", None)
        print(ids.values[0], attention_mask.values[0], arguments, file=sys.stderr)
        return torch.tensor([[0] * (ids.shape[1] + arguments["max_new_tokens"])] * ids.shape[0], None)

def from_config(config, dtype, attn_implementation):
    return Model(config, attn_implementation)

AutoModelForCausalLM = Namespace(from_config=from_config)
"""


def hf_generate(folder: Path, lengths: list[list[int]], system: str) -> tuple[list[dict], list[str]]:
    """Its rows, and what the stand-in was asked for."""
    (folder / "transformers").mkdir()
    (folder / "torch.py").write_text(TORCH)
    (folder / "transformers" / "__init__.py").write_text(TRANSFORMERS)
    (folder / "transformers" / "utils.py").write_text("is_flash_attn_2_available = lambda: False")
    (folder / "a.json").write_text(json.dumps({"lengths": lengths}))
    shape = str(package_data("shapes", "llama2-7b"))
    command = [sys.executable, "-m", "experiments.hf_generate", "--model", shape, "--system", system, "--repeat", "2"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    result = subprocess.run(
        [*command, str(folder / "a.json")], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr.splitlines()


@pytest.mark.parametrize("system", ["generate", "static"])
def test_transformers_is_asked_for_the_workloads_own_terms(tmp_path, system):
    rows, calls = hf_generate(tmp_path, [[2, 9], [4, 3]], system)
    assert [(row["trial"], row["outcome"], row["batch"], row["output_tokens"]) for row in rows] == [
        (0, "ok", 2, 12),
        (1, "ok", 2, 12),
    ]
    assert rows[0]["output_tokens_per_s"] == pytest.approx(12 / rows[0]["seconds"])
    asked = [call for call in calls if not call.startswith("reset")]
    assert len(asked) == 3 and len(calls) - len(asked) == (3 if system == "static" else 0)
    assert asked[1].startswith("[0, 0, ") and "[0, 0, 1, 1]" in asked[1]
    for setting in ("'max_new_tokens': 9", "'min_new_tokens': 9", "'temperature': 0.1", "'top_k': 0"):
        assert setting in asked[1]
    assert ("'max_new_tokens': 8" in asked[0]) == (system == "generate")  # a warm-up of what is not compiled is short
    assert len({call.split("]")[0] for call in asked}) == 3  # other prompts in each


def test_where_memory_runs_out_as_many_go_on_as_fit(tmp_path):
    rows, _ = hf_generate(tmp_path, [[2, 2]] * 9, "generate")
    assert [(row["outcome"], row["batch"]) for row in rows] == [("out of memory", 9), ("ok", 5), ("ok", 5)]
    assert rows[0]["message"] == "no room"


def test_what_is_not_installed_is_a_row(tmp_path):
    rows, _ = hf_generate(tmp_path, [[2, 2]], "flash")
    assert [(row["outcome"], row["message"]) for row in rows] == [("not installed", "flash_attn")]


def test_a_system_that_fails_or_takes_too_long_is_a_row(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho loading; echo \'{"outcome": "ok"}\'\n'
        'case "$*" in *generate\\ --repeat*) exit 0;; *static*) echo boom >&2; exit 3;; esac\nexec sleep 60\n'
    )
    python.chmod(0o755)
    args = Namespace(hf_python=str(python), batch=[1], small=True, path="x", repeat=1, temperature=0.1)
    args.compile_level, args.timeout = 0, 1.0
    last = {
        system: [*vs_hf.transformers_rows(args, system, tmp_path)] for system in ("generate", "static", "continuous")
    }
    assert last["generate"] == [{"outcome": "ok"}]
    assert last["static"][1:] == [{"system": "static", "outcome": "failed", "message": "boom"}]
    assert last["continuous"][1:] == [{"system": "continuous", "outcome": "out of time", "message": "1 s are over"}]
    lengths = json.loads((tmp_path / "single-128-256.json").read_text())["lengths"]
    assert lengths == [[24, 8]]


def test_the_engine_gives_every_request_its_length():
    engine = make_engine(*load_tiny("gqa"))
    seconds, pages = vs_hf.run(engine, [(9, 5), (3, 5)], 0.0, seed=1)
    assert seconds > 0 and pages == 4 + 2 and engine.pool.num_used == 0  # the last token's KV is never written


def test_rows_are_kept_and_rates_compared(monkeypatch, capsys, tmp_path):
    def row(system: str, rate: float) -> dict:
        found = {"workload": "w", "batch": 1, "system": system, "outcome": "ok", "seconds": 1.0}
        return found | {"output_tokens_per_s": rate, "peak_bytes": 1 << 30}

    failed = {"system": "static", "outcome": "failed", "message": "boom"}
    measured = [row("generate", 10), row("generate", 20), failed, row("pagedjax", 50)]
    monkeypatch.setattr(vs_hf, "measured", lambda args: iter(measured))
    results = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["vs_hf", "--results", str(results)])
    vs_hf.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["w", "generate", "1", "1.00", "10.0", "1.0"]
    assert lines[-3].strip() == "static            failed: boom"
    assert lines[-1] == "w: pagedjax is 2.5 times as fast as generate"
    assert read_rows(results) == measured


@pytest.mark.slow
def test_without_torch_pagedjax_runs_alone(monkeypatch, capsys, tmp_path):
    results = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["vs_hf", "--small", "--batch", "1", "--results", str(results)])
    vs_hf.main()
    rows = read_rows(results)
    assert [(row["system"], row["outcome"], row["trial"]) for row in rows] == [("pagedjax", "ok", i) for i in range(3)]
    assert "transformers is left out" in capsys.readouterr().err
    assert all(row["output_tokens"] == 8 and row["peak_kv_bytes"] > 0 for row in rows)
