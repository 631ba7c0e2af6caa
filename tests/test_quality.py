"""The experiment on quality judges what it says it does."""

import json
import sys

import numpy as np
import pytest
from helpers import TINY, causal_logits, load_tiny

from experiments import quality
from experiments.common import read_rows
from experiments.quality import (
    REFERENCE,
    Dense,
    Judged,
    Paged,
    compared,
    make_texts,
    paged_trials,
    perplexity,
    read_texts,
)
from pagedjax.demo import demo_model_path

WINDOWS = np.random.default_rng(0).integers(0, 128, (2, 12)).astype(np.int32)


class Letters:
    """A tokenizer of one token a letter."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(map(ord, text))


def test_windows_are_the_same_text_every_time_and_no_two_are_alike():
    texts, again = (make_texts(Letters(), "folder/name", 3, 4, 50) for _ in range(2))  # pyright: ignore
    assert texts.ids.shape == (3, 4, 50) and (texts.ids == again.ids).all() and texts.about == again.about
    assert len({window.tobytes() for window in texts.ids.reshape(12, 50)}) == 12
    assert texts.about["model"] == "name" and len(texts.about["ids_sha256"]) == 64
    with pytest.raises(ValueError, match="trials \\* windows \\* length=1000000000; accepted: up to "):
        make_texts(Letters(), "name", 10, 100, 1_000_000)  # pyright: ignore


def test_a_part_of_the_reference_is_judged_as_it_was():
    whole, part = read_texts(REFERENCE, 3, 16, 512), read_texts(REFERENCE, 2, 3, 40)
    assert (part.ids == whole.ids[:2, :3, :40]).all() and whole.about["model"] == demo_model_path().name
    assert (part.judged[1].logprobs == whole.judged[1].logprobs[:3, :39]).all()
    assert (part.judged[1].likeliest == whole.judged[1].likeliest[:3, :39]).all()
    with pytest.raises(ValueError, match=r"trials, windows, length=\(3, 17, 512\); accepted: up to \(3, 16, 512\)"):
        read_texts(REFERENCE, 3, 17, 512)


def test_measures_are_what_they_are_called():
    reference = Judged(np.log(np.full((2, 2), 0.25, np.float32)), np.array([[1, 2], [3, 4]]))
    found = Judged(reference.logprobs + np.array([[0, 0.5], [0, -0.25]], np.float32), np.array([[1, 2], [3, 5]]))
    assert perplexity(reference)["perplexity"] == pytest.approx(4)
    wanted = {"agreement": 0.75, "max_difference": 0.5, "mean_difference": 0.1875}
    assert compared(found, reference) == pytest.approx(wanted)


def test_dense_judges_each_token_by_those_before_it():
    judged = Dense(str(TINY / "gqa"), "float32").judge(WINDOWS)
    for i, window in enumerate(WINDOWS):
        logits = np.asarray(causal_logits(*load_tiny("gqa"), window.tolist()), np.float64)[:-1]
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(judged.logprobs[i], logprobs[np.arange(11), window[1:]], atol=1e-4)
        assert (judged.likeliest[i] == logits.argmax(axis=1)).all()


def test_paged_prefill_and_decode_say_what_dense_does():
    path = str(TINY / "gqa")
    paged, dense = Paged(path, "float32", "xla", 2, 12), Dense(path, "float32")
    prefill, decode = paged_trials(paged, WINDOWS[None], dense, [dense.judge(WINDOWS)], decoded=4)
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    assert prefill["perplexity"] == pytest.approx(perplexity(dense.judge(WINDOWS))["perplexity"], rel=1e-4)
    for row in (prefill, decode):
        assert row["agreement"] == 1 and row["max_difference"] < 1e-4
    tokens, logprobs = paged.decode(WINDOWS[:, :6], 4)
    shifted = Judged(logprobs + 1, (tokens + 1) % 128)
    again = dense.judge(np.concatenate([WINDOWS[:, :6], tokens], axis=1))
    assert compared(shifted, Judged(*(part[:, -4:] for part in again)))["agreement"] == 0


def test_another_models_reference_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "other.npz"
    with np.load(REFERENCE) as file:
        np.savez(path, **{**file, "about": json.dumps({"model": "other.gguf"})})
    results = str(tmp_path / "rows.jsonl")
    monkeypatch.setattr(sys, "argv", ["quality", "--small", "--reference", str(path), "--results", results])
    with pytest.raises(ValueError, match=r"is of other\.gguf; accepted: one of SmolLM2"):
        quality.main()


@pytest.mark.slow
def test_the_demo_model_is_as_good_as_transformers_says(monkeypatch, tmp_path):
    results = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["quality", "--small", "--results", str(results)])
    quality.main()
    rows = read_rows(results)
    theirs = [row["perplexity"] for row in rows if row["system"] == "transformers"]
    ours = [row for row in rows if row["system"] != "transformers"]
    assert [row["system"] for row in ours] == ["dense"] * 2 + ["paged"] * 4
    for row in ours:
        assert row["agreement"] == 1 and row["max_difference"] < 1e-3
        assert row["phase"] == "decode" or row["perplexity"] == pytest.approx(theirs[row["trial"]], rel=1e-4)
