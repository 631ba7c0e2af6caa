"""Compiled functions on disk: found again by a process like the one that saved them, and by no other."""

import os
import subprocess
import sys

import pytest
from helpers import greedy, load_tiny, run

import pagedjax.step
from pagedjax.config import EngineConfig
from pagedjax.engine import Engine
from pagedjax.executables import fingerprint
from pagedjax.models import llama
from pagedjax.pallas_kernels import dispatch, tuning

PROMPTS = [[5, 6, 7], [8, 9]]
SIZES = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 32, "page_size": 4, "num_pages": 40}


pytestmark = pytest.mark.usefixtures("without_jax_cache")


def engine_in(folder, **config) -> Engine:
    model, params = load_tiny("gqa")
    return Engine(EngineConfig(model="test", **{**SIZES, **config}), model, params, executables=folder)


def tokens_of(engine: Engine) -> list[list[int]]:
    return [r.output_token_ids for r in run(engine, PROMPTS, greedy(5))]


def test_a_second_engine_compiles_nothing_and_gives_the_same_tokens(tmp_path):
    first, second = engine_in(tmp_path), engine_in(tmp_path)
    first.warm_up(progress=False)
    assert first.num_compilations == len(list(tmp_path.iterdir())) == first.runner.num_common
    second.warm_up(progress=False)
    assert second.num_compilations == 0
    assert tokens_of(first) == tokens_of(second)


@pytest.mark.slow
def test_an_engine_that_finds_everything_keeps_its_pool(tmp_path, monkeypatch):
    """Dropped, it might not find its place again among what else is on the device."""
    engine_in(tmp_path).warm_up(progress=False)
    engine = engine_in(tmp_path)
    monkeypatch.setattr(engine.runner, "_make_state", lambda: pytest.fail("made anew"))
    engine.warm_up(progress=False)
    assert tokens_of(engine)


def test_what_is_first_needed_in_a_run_is_saved_too(tmp_path):
    expected = tokens_of(engine_in(tmp_path))
    engine = engine_in(tmp_path)
    assert tokens_of(engine) == expected
    assert engine.num_compilations == 0


@pytest.mark.slow
def test_other_shapes_settings_or_code_find_nothing(tmp_path, monkeypatch):
    tokens_of(engine_in(tmp_path))
    rope = pagedjax.step.apply_rope
    for config in ({"num_pages": 41}, {"attention_impl": "reference"}):
        engine = engine_in(tmp_path, **config)
        tokens_of(engine)
        assert engine.num_compilations, config
    monkeypatch.setattr(pagedjax.step, "apply_rope", lambda x, *rest: -rope(x, *rest))
    engine = engine_in(tmp_path)
    tokens_of(engine)
    assert engine.num_compilations


@pytest.mark.slow
def test_a_damaged_file_is_compiled_anew(tmp_path, caplog):
    expected = tokens_of(engine_in(tmp_path))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert tokens_of(engine_in(tmp_path)) == expected
    assert "compiling anew" in caplog.text
    engine = engine_in(tmp_path)
    tokens_of(engine)
    assert engine.num_compilations == 0  # mended


def test_a_folder_that_cannot_be_written_is_only_reported(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert tokens_of(engine_in(tmp_path / "file" / "folder"))
    assert "cannot be saved" in caplog.text


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_every_process():
    code = "import pagedjax.step as s; from pagedjax.executables import fingerprint; print(fingerprint(s))"
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env=env | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (pagedjax.step, "SAMPLE_ROWS", 128),
        (llama.RMSNorm, "__call__", lambda self, x: x),
        (dispatch, "paged_decode_mosaic", lambda *args, **options: args[0]),
        (tuning, "DECODE_TILES", {}),
    ],
)
def test_the_fingerprint_changes_with_any_code_that_a_step_uses(monkeypatch, owner, name, value):
    before = fingerprint(pagedjax.step)
    assert fingerprint(pagedjax.step) == before
    monkeypatch.setattr(owner, name, value)
    assert fingerprint(pagedjax.step) != before


def test_the_fingerprint_sees_the_innermost_of_many_functions(monkeypatch):
    def nested(constant: int):
        lines = [f"{' ' * i}def f{i}():" for i in range(15)]
        scope: dict = {}
        exec("\n".join([*lines, f"{' ' * 15}return {constant}"]), scope)
        return scope["f0"]

    found = set()
    for constant in (1000, 2000):
        monkeypatch.setattr(pagedjax.step, "apply_rope", nested(constant))
        found.add(fingerprint(pagedjax.step))
    assert len(found) == 2
