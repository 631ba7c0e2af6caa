"""With `batch_invariant` a request's tokens and log-probabilities are the same bits, whatever shares its batch."""

import sys
from typing import Any

import numpy as np
import pytest
from helpers import greedy, load_tiny, make_engine

from experiments import invariance
from experiments.common import read_rows
from experiments.invariance import Crowd, Outputs, outputs
from pagedjax.config import EngineConfig
from pagedjax.engine import Engine
from pagedjax.sampling_params import SamplingParams

RNG = np.random.default_rng(5)
SUBJECTS = [
    (RNG.integers(0, 128, 21).tolist(), SamplingParams(temperature=0.9, seed=3, max_tokens=14, ignore_eos=True)),
    (RNG.integers(0, 128, 5).tolist(), SamplingParams(n=2, temperature=1.3, seed=8, max_tokens=20, ignore_eos=True)),
    (RNG.integers(0, 128, 13).tolist(), SamplingParams(seed=4, top_p=0.9, max_tokens=9, ignore_eos=True)),
    (RNG.integers(0, 128, 9).tolist(), greedy(17)),
]
CROWD = Crowd(SUBJECTS, vocab_size=128, others=9, prompt=12, output=25)


def make(**config: Any) -> Engine:
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 48, "num_pages": 31}
    return make_engine(*load_tiny("gqa"), batch_invariant=True, **{**sizes, **config})


@pytest.fixture(scope="module")
def alone() -> list[Outputs]:
    """Every subject in an engine of its own for the time, with neither shared prefixes nor steps ahead."""
    return CROWD.alone(make(lookahead=0, enable_prefix_caching=False))


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_no_crowd_changes_a_bit(alone, count: int):
    engine, rng, hits = make(lookahead=2), np.random.default_rng(count), 0
    for _ in range(count):
        if rng.random() < 0.3:
            engine.reset_prefix_cache()
        for number, requests in CROWD.run(engine, rng).items():
            assert outputs(requests) == alone[number]
            hits += sum(r.num_cached_tokens for r in requests)
    assert hits > 0 and engine.scheduler.stats.num_preemptions > count / 10


@pytest.mark.slow
def test_neither_swapping_nor_larger_pools_change_a_bit(alone):
    rng = np.random.default_rng(0)
    for config in ({"swap_space": 0.01, "preemption_mode": "swap"}, {"num_pages": 400, "lookahead": 0}):
        engine = make(**config)
        for _ in range(10):
            for number, requests in CROWD.run(engine, rng).items():
                assert outputs(requests) == alone[number]
        assert bool(engine.scheduler.stats.num_swap_ins) == ("swap_space" in config)


def test_a_prompt_s_logprobs_are_the_bits_that_decoding_gave():
    engine = make()
    prompt, _ = SUBJECTS[0]
    (decoded,) = engine.add_request("decoded", prompt, greedy(12, logprobs=0), recorded=True)
    while engine.has_unfinished:
        engine.step()
    tokens = prompt + decoded.output_token_ids
    (scored,) = engine.add_request("scored", tokens, greedy(1, prompt_logprobs=0))
    CROWD.add(engine, 1)
    while engine.has_unfinished:
        engine.step()
    expected = [found[token].logprob for found, token in zip(decoded.logprobs, tokens[len(prompt) :], strict=True)]
    pairs = zip(scored.prompt_logprobs[len(prompt) :], tokens[len(prompt) :], strict=True)
    assert [found[token].logprob for found, token in pairs] == expected == decoded.recorded_logprobs


def test_there_is_one_forward_function():
    engine = make()
    CROWD.add(engine, 0)
    CROWD.add(engine, 3)
    while engine.has_unfinished:
        engine.step()
    forward = [name for name in engine.runner.compilations if name.startswith(("forward", "decode"))]
    assert forward == ["forward mixed-16"]


@pytest.mark.slow
def test_the_experiment_tells_the_invariant_from_the_plain(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["invariance", "--small", "--results", str(path)])
    invariance.main()
    crowds, cost = ([row for row in read_rows(path) if row["part"] == part] for part in invariance.PARTS)
    assert [row["different"] > 0 for row in crowds] == [False, False, True] and crowds[0]["compared"] == 12
    assert len(cost) == 3 and all(row["output_tokens_per_s"] > 0 for row in cost)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"decode_steps": 4}, "decode_steps=4; accepted: 1 or None with batch_invariant=True"),
        ({"max_num_seqs": 300}, "max_num_seqs=300; accepted: up to 256, or a multiple"),
        ({"batch_invariant": 1}, "batch_invariant=1; accepted: True or False"),
    ],
)
def test_settings_that_contradict_it_are_refused(config: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        EngineConfig(model="x", **{"batch_invariant": True, **config})
