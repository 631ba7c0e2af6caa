"""The comparison with vLLM, with a stand-in for vLLM: what is asked of it, and what is made of the answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import vs_vllm
from experiments.limit import Ceilings, limit
from pagedjax.bench import load_workload, package_data
from pagedjax.models.load import open_checkpoint, read_config

ROOT = Path(__file__).parent.parent
STAND_IN = """
import json, sys
from types import SimpleNamespace as Namespace

__version__ = "0"

def SamplingParams(**params):
    return params

class LLM:
    def __init__(self, model, **settings):
        json.load(open(model + "/config.json"))
        print(settings, file=sys.stderr)

    def generate(self, prompts, params, use_tqdm):
        print([len(p["prompt_token_ids"]) for p in prompts], params, file=sys.stderr)
        return [Namespace(outputs=[Namespace(token_ids=[0] * p["max_tokens"])]) for p in params]
"""


def test_vllm_is_asked_for_the_workloads_own_terms(tmp_path):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    for name, lengths in (("a", [[3, 2], [5, 4]]), ("b", [[1, 1]])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"lengths": lengths}))
    shape = ROOT / "pagedjax" / "shapes" / "llama3.2-1b.json"
    command = [sys.executable, ROOT / "experiments" / "vllm_bench.py", "--shape", shape, "--repeat", "2"]
    result = subprocess.run(
        [*map(str, command), str(tmp_path / "a.json"), str(tmp_path / "b.json")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["workload"], len(row["runs"])) for row in rows] == [("a", 2), ("b", 2)]
    best = rows[0]["best"]
    assert best["output_tokens_per_s"] == pytest.approx(6 / best["seconds"])
    settings, *calls = result.stderr.splitlines()
    for setting in ("'load_format': 'dummy'", "'dtype': 'bfloat16'", "'enable_prefix_caching': False"):
        assert setting in settings
    assert "'max_model_len': 9" in settings
    assert len(calls) == 6 and calls[0].startswith("[3, 5]")
    assert "'ignore_eos': True" in calls[0] and "'temperature': 0" in calls[0] and "'max_tokens': 4" in calls[0]


def test_each_workload_gets_a_rate_and_a_ratio(monkeypatch, capsys, tmp_path):
    def prints(rates):
        lines = [json.dumps({"workload": name, "best": {"output_tokens_per_s": rate}}) for name, rate in rates.items()]
        return [sys.executable, "-c", "print('starting'); print(" + repr("\n".join(lines)) + ")"]

    engines = {"pagedjax": prints({"a": 30.0, "b": 10.0}), "vllm": prints({"a": 20.0, "b": 20.0})}
    allowed = {name: {"limit": 40.0, "copy_tb_s": 4.0, "tflops": 800.0} for name in "ab"}
    monkeypatch.setattr(vs_vllm, "limits", lambda shape, workloads: allowed)
    monkeypatch.setattr(vs_vllm, "commands", lambda args, shape: engines)
    results = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["vs_vllm", "--shape", "llama3-8b", "--results", str(results)])
    vs_vllm.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1:] for line in table[2:]] == [
        ["a", "pagedjax", "30.0", "40", "0.75"],
        ["b", "pagedjax", "10.0", "40", "0.25"],
        ["a", "vllm", "20.0", "40", "0.50", "1.50"],
        ["b", "vllm", "20.0", "40", "0.50", "0.50"],
    ]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["pagedjax", "pagedjax", "vllm", "vllm"]
    monkeypatch.setattr(vs_vllm, "commands", lambda args, shape: {"pagedjax": [sys.executable, "-c", "exit(3)"]})
    with pytest.raises(RuntimeError, match="exit code 3"):
        vs_vllm.main()


def test_every_named_workload_is_there_and_goals_lie_between_vllm_and_the_limit():
    for shape, workloads in vs_vllm.TABLE.items():
        assert (ROOT / "pagedjax" / "shapes" / f"{shape}.json").is_file()
        for name, figures in workloads.items():
            assert (ROOT / "pagedjax" / "workloads" / f"{name}.json").is_file()
            assert figures.vllm < figures.goal < figures.limit


@pytest.mark.parametrize("shape", vs_vllm.TABLE)
def test_the_limits_of_the_table_are_what_its_card_allows(shape):
    config = read_config(open_checkpoint(str(package_data("shapes", shape)))[0])
    for name, figures in vs_vllm.TABLE[shape].items():
        allowed = limit(config, load_workload(name).lengths, Ceilings(4.27, 790))
        assert allowed == pytest.approx(figures.limit, rel=0.01), name
