"""The experiment on an engine inside a training program: what its rows say of updates and of the loop."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import rollouts
from experiments.common import read_rows
from pagedjax.models.config import LlamaConfig
from pagedjax.models.llama import Llama
from pagedjax.rollout import RolloutBatch


@pytest.mark.slow
def test_rows_of_updates_and_of_the_loop(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["rollouts", "--small", "--results", str(path)])
    rollouts.main()
    rows = read_rows(path)
    assert all(row["compilations"] == 0 for row in rows)
    updates, loop = ([row for row in rows if row["part"] == part] for part in rollouts.PARTS)
    assert [row["trainer"] for row in updates] == ["bfloat16", "float32"]
    assert updates[1]["tree_bytes"] == 2 * updates[0]["tree_bytes"] == 2 * updates[1]["weights_bytes"]
    alone, trained = loop
    assert set(trained["seconds"]) == {"rollout", "release", "train", "restore", "update"}
    assert alone["loop_rollouts_per_s"] <= alone["rollouts_per_s"] == alone["rollouts"] / alone["seconds"]["rollout"]
    assert trained["loop_rollouts_per_s"] < trained["rollouts_per_s"]


def test_a_step_in_microbatches_is_one_of_all(monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Llama(LlamaConfig.from_hf({"vocab_size": 8, **sizes}))
    params, shape = model.init(seed=0), (4, 6)
    monkeypatch.setattr(rollouts, "RATE", 1e3)
    tokens = np.arange(24, dtype=np.int32).reshape(shape) % 8
    mask, zeros = np.arange(6) > np.zeros((4, 1)) + 2, np.zeros(shape, np.float32)
    batch = RolloutBatch(tokens, mask, mask, zeros[:, 0], zeros[:, 0], zeros, zeros, zeros[:, 0])
    gains = np.array([[1.0], [-1.0], [0.5], [2.0]], np.float32)
    whole, parts = (rollouts.make_train_step(model, rows)(params, batch, gains) for rows in (4, 2))
    steps = [jax.tree.map(lambda new, old: new - old, tree, params) for tree in (whole, parts)]
    for one, two in zip(*map(jax.tree.leaves, steps), strict=True):
        np.testing.assert_allclose(two, 2 * one, rtol=1e-3, atol=1e-6)  # a sum over microbatches of means
        assert jnp.abs(one).max() > 0
