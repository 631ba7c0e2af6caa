"""The dense baseline gives the paged engine's tokens, holds what its bytes allow, and is measured as the others are."""

import sys
from argparse import Namespace
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import TINY, greedy, load_tiny, make_engine, run

from experiments.common import read_rows
from experiments.dense_attention import DECODE, Choice, Decode, choose
from experiments.dense_engine import DenseEngine, DenseRunner, cuts, prompt_sizes
from experiments.dense_kv import SYSTEMS, Systems, latency, main
from pagedjax.bench import Workload, run_workload
from pagedjax.kv_cache import bytes_per_page
from pagedjax.sampling_params import SamplingParams

MAX_LEN, CUT = 96, 32
LENGTHS = [(3, 9), (40, 2), (1, 30), (70, 20), (64, 1), (5, 5), (33, 12)]  # (prompt tokens, output tokens)


def whole_rows(q, k, v, kv_lens):
    """As a library's kernel takes them."""
    return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=kv_lens)[:, 0]


ATTENTION = DECODE | {"whole rows": Decode(whole_rows, heads_first=False, cut=False)}
del ATTENTION["cudnn"]


def make_runner(attention: str) -> DenseRunner:
    choice = Choice(ATTENTION[attention], attention, dict.fromkeys(prompt_sizes(MAX_LEN), "xla"), {}, {})
    return DenseRunner(*load_tiny("gqa"), 2, MAX_LEN, CUT, choice)


@pytest.fixture(scope="module")
def runner() -> DenseRunner:
    """Of two rows, with all compiled."""
    runner = make_runner("xla")
    runner.warm_up()
    return runner


def prompts() -> list[list[int]]:
    return [[(7 * i + 3 * j) % 90 + 3 for j in range(length)] for i, (length, _) in enumerate(LENGTHS)]


def run_dense(engine: DenseEngine) -> list[list[int]]:
    requests = [
        request
        for i, (prompt, (_, length)) in enumerate(zip(prompts(), LENGTHS, strict=True))
        for request in engine.add_request(str(i), prompt, greedy(length))
    ]
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    return [request.output_token_ids for request in requests]


@pytest.fixture(scope="module")
def paged_tokens() -> list[list[int]]:
    requests = run(make_engine(*load_tiny("gqa")), prompts(), [greedy(length) for _, length in LENGTHS])
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("attention", ATTENTION)
def test_dense_tokens_are_paged_tokens(paged_tokens, attention):
    assert run_dense(DenseEngine(make_runner(attention), continuous=True)) == paged_tokens


def test_static_batches_give_the_same_tokens(paged_tokens, runner):
    assert run_dense(DenseEngine(runner, continuous=False)) == paged_tokens


@pytest.mark.parametrize("continuous", [True, False])
def test_a_free_row_is_refilled_under_continuous_batching_alone(runner, continuous):
    engine = DenseEngine(runner, continuous)
    for i, length in enumerate((2, 6, 2)):
        engine.add_request(str(i), [5, 6, 7], greedy(length))
    running = []
    while engine.has_unfinished:
        engine.step()
        running.append([r.request_id for r in engine.scheduler.running])
    if continuous:
        assert running == [["0", "1"], ["0", "1"], ["2", "1"], ["2", "1"], ["1"], ["1"], []]
    else:
        assert running == [["0", "1"], ["0", "1"], *[["1"]] * 4, ["2"], ["2"], []]


def test_caches_are_written_in_place(runner):
    cache = sum(x.nbytes for layer in runner._kv for x in layer)
    for function in runner._functions.values():
        assert function.memory_analysis().alias_size_in_bytes >= cache


def test_requests_that_do_not_fit_or_are_sampled_are_refused(runner):
    engine = DenseEngine(runner, continuous=True)
    with pytest.raises(ValueError, match="max_len=96"):
        engine.add_request("0", [1] * 90, greedy(7))
    with pytest.raises(ValueError, match="temperature=0"):
        engine.add_request("0", [1], SamplingParams(temperature=0.5, max_tokens=3, ignore_eos=True))


def test_the_benchmark_compiles_nothing_and_counts_what_rows_waste(runner):
    lengths = [(3, 4), (10, 9), (50, 6)]
    result = run_workload(DenseEngine(runner, continuous=False), Workload("mine", lengths), seed=0)
    assert result["compilations_in_run"] == 0
    assert 0.6 < result["page_waste"] < 1  # rows of 96 tokens for 7, 19 and 56


def test_the_faster_attention_is_taken_and_what_does_not_run_says_why():
    model, _ = load_tiny("gqa")
    lengths = cuts(MAX_LEN, CUT), prompt_sizes(MAX_LEN)
    choice = choose(model.config, model.dtype, 2, MAX_LEN, *lengths)
    assert set(choice.prefill) == set(lengths[1]) and choice.decode is DECODE[choice.decode_name]
    assert all(isinstance(why, str) and why for why in choice.decode_s["cudnn"].values())
    seconds: dict[str, Any] = {name: list(times.values()) for name, times in choice.decode_s.items() if name != "cudnn"}
    assert sum(seconds[choice.decode_name]) == min(sum(times) for times in seconds.values()) > 0


def make_systems(*systems: str, **more) -> Systems:
    args = Namespace(shape=str(TINY / "gqa" / "config.json"), small=False, system=systems)
    defaults = {"kv_gib": 1 / 2**10, "max_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 32}
    vars(args).update({**defaults, **more})
    return Systems(args)


def test_capacity_follows_the_budget():
    systems = make_systems()
    model = systems.model.config
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(systems.model.dtype).itemsize
    assert systems.num_rows == 2**20 // (128 * token) and systems.num_pages == 2**20 // (16 * token)
    twice = make_systems(kv_gib=2 / 2**10, max_len=64)
    assert twice.num_rows == 4 * systems.num_rows and twice.num_pages == 2 * systems.num_pages
    with pytest.raises(ValueError, match="max_len=128"):
        _ = make_systems(kv_gib=1e-6).num_rows


@pytest.mark.slow
def test_one_policy_compiles_for_all_and_all_hold_the_same_bytes(without_jax_cache, tmp_path):
    systems = make_systems("dense-static")
    systems.executables, counts, sizes = tmp_path, Counter(), set()
    for system in ("paged", "max", "dense-static", "dense-continuous"):
        engine, _ = systems.make(system)
        counts[system] = engine.num_compilations
        caches = jax.tree.leaves(engine.runner._kv)
        null_page = 0 if system.startswith("dense") else bytes_per_page(systems.model.config, 16, systems.model.dtype)
        sizes.add(sum(x.nbytes for x in caches) - null_page)
    assert counts["paged"] > 0 and counts["dense-static"] > 0
    assert counts["max"] == counts["dense-continuous"] == 0
    assert sizes == {systems.budget}


def test_rates_rise_until_the_system_is_saturated(monkeypatch):
    means = {1: 0.1, 2: 0.2, 4: 0.4, 8: 9.0}
    monkeypatch.setattr(
        "experiments.dense_kv.measured",
        lambda engine, args, seed, count, rate: {"rate": rate, "normalized_latency_s": {"mean": means[rate]}},
    )
    nobody: Any = None
    rows = list(latency(nobody, Namespace(rates=[1, 2, 4, 8], rate_repeat=1, seconds=5)))
    assert [(row["rate"], row["saturated"]) for row in rows] == [(1, False), (2, False), (4, True)]


@pytest.mark.slow
def test_a_small_run_has_a_row_of_every_system_and_trial(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["dense_kv", "--small", "--results", str(path)])
    main()
    rows = read_rows(path)
    trials = [(system, rate) for system in SYSTEMS for rate in (None, 20, 200)]
    assert set(trials[::3] + trials[1::3]) <= {(row["system"], row["rate"]) for row in rows} <= set(trials)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(SYSTEMS) + len(rows)
    assert {row["kv_budget_bytes"] for row in rows} == {2**20}
    for row in rows:
        assert row["tokens_per_s"] > 0 and row["mean_in_flight"] > 0 and row["compilations_in_run"] == 0
        assert row["normalized_latency_s"]["mean"] > 0 and row["config"] and row["device"] and row["commit"]
        dense = row["system"].startswith("dense")
        assert (row["capacity"], row["capacity_of"]) == ((2, "rows") if dense else (16, "pages"))
        assert row["attention"]["decode"] in DECODE if dense else row["attention"] == "xla"
        assert ("mean_in_flight_queued" in row) == (row["rate"] is None)
