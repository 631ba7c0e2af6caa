"""Reinforcement learning on the engine's rollouts: what the objective is, by hand, and that the experiment runs."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import rl
from experiments.common import read_rows
from experiments.grpo import Experience, group_advantages, kl_estimate, make_train_step, objective

MASK = np.array([[False, True, True, False], [False, True, False, False]])


def experience(advantages: list[float], old: Any = 0.0, reference: Any = 0.0) -> Experience:
    fill = [np.broadcast_to(np.asarray(x, np.float32), MASK.shape) for x in (old, reference)]
    return Experience(np.zeros(MASK.shape, np.int32), MASK, fill[0], fill[1], np.array(advantages, np.float32))


def test_advantages_have_mean_0_and_deviation_1_in_every_group():
    found = group_advantages(np.array([[1.0, 0, 0, 0], [5, 7, 5, 7], [1, 1, 1, 1]]))
    np.testing.assert_allclose(found[0], [3**0.5, *[-(3**-0.5)] * 3], rtol=1e-5)
    np.testing.assert_allclose(found[1], [-1, 1, -1, 1], rtol=1e-5)
    assert not found[2].any()


def test_the_clipped_objective_is_the_one_computed_by_hand():
    # Ratios 1.5 and 0.5 of a good completion, of which 1.2 and 0.5 count; 0.5 of a bad one, of which 0.8 does.
    logprobs = jnp.log(jnp.array([[9.0, 1.5, 0.5, 9.0], [9.0, 0.5, 9.0, 9.0]]))
    loss, seen = objective(logprobs, experience([2.0, -1.0]), clip=0.2, kl_weight=0.0)
    first, second = (1.2 * 2 + 0.5 * 2) / 2, -0.8
    assert float(loss) == pytest.approx(-(first + second) / 2, rel=1e-6)
    assert float(seen["clip_fraction"]) == pytest.approx((1 / 2 + 1) / 2)


def test_the_penalty_is_k3_of_policy_and_reference():
    logprobs, reference = jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[0.25]]))
    kl = kl_estimate(logprobs, reference, jnp.array([[True]]))
    assert float(kl[0, 0]) == pytest.approx(0.5 - 1 - np.log(0.5), rel=1e-5)
    parts = experience([0.0, 0.0], old=np.log(0.5), reference=np.log(0.25))
    loss, _ = objective(jnp.full(MASK.shape, np.log(0.5)), parts, clip=0.2, kl_weight=3.0)
    assert float(loss) == pytest.approx(3 * float(kl[0, 0]), rel=1e-5)


@pytest.mark.parametrize("other", [7.0, -1e30, np.nan])
def test_tokens_that_were_not_sampled_enter_neither_loss_nor_gradient(other: float):
    def loss(logprobs):
        return objective(logprobs, experience([1.0, -1.0], old=-1.0, reference=-2.0), clip=0.2, kl_weight=0.1)[0]

    logprobs = np.full(MASK.shape, -1.1, np.float32)
    expected = jax.value_and_grad(loss)(logprobs)
    found = jax.value_and_grad(loss)(np.where(MASK, logprobs, np.float32(other)))
    assert float(found[0]) == float(expected[0])
    assert (np.asarray(found[1]) == np.asarray(expected[1])).all() and not np.asarray(found[1])[~MASK].any()


def settings(**changes: Any) -> rl.Settings:
    return rl.Settings(**{**rl.SMALL, **changes})


@pytest.fixture(scope="module")
def trainer() -> rl.Trainer:
    return rl.Trainer(settings(steps=60, rate=3e-3))


def test_nothing_is_learned_from_groups_whose_rewards_are_all_equal(trainer: rl.Trainer, monkeypatch):
    same = make_train_step(trainer.model, trainer.optimizer, 0.2, 0.0, 1.0)
    monkeypatch.setattr(trainer, "train", same)
    params, rng = trainer.model.init(0), np.random.default_rng(0)
    trainer.llm.update_params(params)
    for rewarded in (0.0, 1.0):
        monkeypatch.setattr(rl, "reward", lambda *_, value=rewarded: value)
        new, *_ = trainer.step(params, trainer.optimizer.init(params), params, rng, np.arange(100))
        assert all((new[name] == params[name]).all() for name in params)


def test_what_is_rewarded_becomes_likelier(trainer: rl.Trainer, monkeypatch):
    def share(pair: int, completion: list[int]) -> float:
        return float(np.mean(np.array(completion) < 5))

    monkeypatch.setattr(rl, "reward", share)
    params, rng, rewards = trainer.model.init(0), np.random.default_rng(0), []
    trainer.llm.update_params(params)
    reference, state = params, trainer.optimizer.init(params)
    for _ in range(60):
        params, state, row = trainer.step(params, state, reference, rng, np.arange(10_000))
        rewards.append(row["reward"])
        assert row["apart_max"] < 1e-4
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


def test_the_reward_is_for_the_right_digits_and_an_end():
    assert rl.prompt_of(3758) == [3, 7, rl.PLUS, 5, 8, rl.EQUALS] and rl.prompt_of(7)[:3] == [0, 0, rl.PLUS]
    assert rl.reward(3758, [9, 5, rl.END]) == 1 and rl.reward(9904, [1, 0, 3, rl.END]) == 1
    for wrong in ([9, 5], [9, 6, rl.END], [9, 5, rl.END, rl.END], [0, 9, 5, rl.END], [], [rl.END]):
        assert rl.reward(3758, wrong) == 0


def test_examples_end_in_the_answers():
    tokens, mask = rl.examples(np.array([3758, 9904]))
    for pair, row, kept in zip((3758, 9904), tokens, mask, strict=True):
        assert row[kept].tolist() == rl.answer_of(pair) and row[: rl.PROMPT].tolist() == rl.prompt_of(pair)


def test_sums_held_out_are_never_trained_on(monkeypatch):
    trainer, seen = rl.Trainer(settings(steps=1, held_out=9_900)), set()
    examples, rollout = rl.examples, trainer.rollout

    def watched_examples(pairs):
        seen.update(pairs.tolist())
        return examples(pairs)

    def watched_rollout(pairs, **sampling):
        seen.update(pairs)
        return rollout(pairs, **sampling)

    monkeypatch.setattr(rl, "examples", watched_examples)
    monkeypatch.setattr(trainer, "rollout", watched_rollout)
    monkeypatch.setattr(trainer, "exact_match", lambda *_: 0.0)
    list(trainer.run(3))
    train, held = np.split(np.random.default_rng(3).permutation(rl.NUMBERS**2), [-9_900])
    assert seen <= set(train.tolist()) and len(seen) > 50 and not seen & set(held.tolist())


def test_a_small_run_has_a_row_of_every_step_and_evaluation(tmp_path, monkeypatch):
    path = tmp_path / "rl.jsonl"
    monkeypatch.setattr(sys, "argv", ["rl", "--small", "--results", str(path)])
    rl.main()
    rows = read_rows(path)
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["phase"] for row in rows if "phase" in row] == ["supervised", "rl", "rl"]
    assert all(np.isfinite(row[key]) for row in steps for key in ("loss", "kl", "reward", "entropy", "clip_fraction"))
    assert steps[0]["kl"] < 1e-6 and steps[1]["policy_version"] > steps[0]["policy_version"]
    assert json.dumps(rows[0]["settings"]) and rows[0]["config"]["batch_invariant"] and rows[0]["commit"]
