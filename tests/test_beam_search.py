"""Beam search: transformers' sequences and scores, pages shared and given back, and beams that lose their pages."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, causal_logits, greedy, load_tiny, make_engine

from pagedjax.beam_search import BeamSearchParams
from pagedjax.demo import demo_model_path
from pagedjax.engine import Engine
from pagedjax.llm import LLM
from pagedjax.sampling_params import SamplingParams

DATA = json.loads((GOLDEN / "beams.json").read_text())
PROMPTS = {p["name"]: p for p in json.loads((GOLDEN / "smollm2.json").read_text())["prompts"]}


@pytest.fixture(scope="module")
def llm():
    return LLM(
        str(demo_model_path()),
        dtype="float32",
        max_num_seqs=16,
        max_num_batched_tokens=128,
        max_model_len=128,
        num_pages=200,
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 4, 8])
def test_sequences_and_scores_equal_transformers(llm, width):
    cases = [case for case in DATA["cases"] if case["width"] == width]
    assert cases
    for case in cases:
        options: Any = {name: case[name] for name in ("length_penalty", "early_stopping") if name in case}
        params = BeamSearchParams(
            beam_width=width,
            max_tokens=DATA["num_tokens"],
            include_stop_str_in_output=True,
            stop=case.get("stop_strings"),
            **options,
        )
        prompt = PROMPTS[case["prompt"]]
        (output,) = llm.beam_search({"prompt_token_ids": prompt["prompt_ids"]}, params, use_tqdm=False)
        found = [sequence.tokens[len(prompt["prompt_ids"]) :] for sequence in output.sequences]
        assert found == case["tokens"], case
        # Errors of log-probabilities add up, so it is their mean that compares: the score of length_penalty 1.
        weights = [len(tokens) ** (case.get("length_penalty", 1.0) - 1) for tokens in found]
        scores = np.array([s.score for s in output.sequences])
        np.testing.assert_allclose(scores * weights, np.array(case["scores"]) * weights, atol=1e-4)
        assert [s.text for s in output.sequences] == [prompt["text"] + text for text in case["texts"]]
    assert llm.engine.pool.num_used == 0


PROMPT = [5, 17, 90, 3, 41, 7]


def search(engine: Engine, prompts: list[list[int]], params: BeamSearchParams, others: int = 0) -> list[Any]:
    """Searches behind so many other requests; integrity is checked at every step."""
    for i in range(others):
        engine.add_request(f"other-{i}", [9 + i, 8, 7], SamplingParams(seed=i, max_tokens=40, ignore_eos=True))
    searches = [engine.add_beam_search(f"beams-{i}", prompt, params) for i, prompt in enumerate(prompts)]
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    assert all(s.done for s in searches) and engine.pool.num_used == 0
    return [s.output().sequences for s in searches]


def tokens_and_scores(outputs: list[Any]) -> tuple[list[Any], list[float]]:
    return [[s.tokens for s in output] for output in outputs], [s.score for output in outputs for s in output]


@pytest.mark.parametrize("length_penalty", [1.0, 0.3])
def test_a_search_finds_what_one_without_pages_finds(length_penalty):
    """Beams as lists, their logits from the whole sequence every time."""
    model, params = load_tiny("gqa")
    width, count = 3, 6
    beams = [(0.0, list(PROMPT))]
    for _ in range(count):
        found = []
        for score, tokens in beams:
            logits = causal_logits(model, params, tokens)[-1]
            logprobs = np.asarray(logits - jnp.log(jnp.exp(logits - logits.max()).sum()) - logits.max())
            found += [(score + logprobs[t], [*tokens, t]) for t in np.argsort(-logprobs)[: 2 * width].tolist()]
        beams = sorted(found, key=lambda beam: -beam[0])[:width]
    search_params = BeamSearchParams(beam_width=width, max_tokens=count, ignore_eos=True, length_penalty=length_penalty)
    (output,) = search(make_engine(model, params), [PROMPT], search_params)
    assert [s.tokens for s in output] == [tokens for _, tokens in beams]
    np.testing.assert_allclose([s.cum_logprob for s in output], [score for score, _ in beams], atol=1e-4)
    np.testing.assert_allclose([s.score * count**length_penalty for s in output], [s.cum_logprob for s in output])
    assert all(s.finish_reason == "length" and s.text is None for s in output)


@pytest.mark.slow
@pytest.mark.parametrize(("caching", "lookahead"), [(True, 2), (False, 0)])
def test_beams_that_lose_pages_and_rows_to_others_find_the_same(caching, lookahead):
    model, params = load_tiny("gqa")
    settings: Any = {"enable_prefix_caching": caching, "lookahead": lookahead}
    params_of = BeamSearchParams(beam_width=4, max_tokens=20)
    prompts = [PROMPT, PROMPT[:3], [50, 60, 70, 80, 90, 100, 110, 120, 1]]
    tokens, scores = tokens_and_scores(search(make_engine(model, params, **settings), prompts, params_of))
    preemptions = 0
    for tight in ({"num_pages": 33}, {"max_num_seqs": 6}):
        engine = make_engine(model, params, **settings, **tight)
        again, more = tokens_and_scores(search(engine, prompts, params_of, others=3))
        assert again == tokens
        np.testing.assert_allclose(more, scores, atol=1e-4)
        preemptions += engine.scheduler.stats.num_preemptions
    assert preemptions > 0


def test_beams_share_all_pages_but_those_that_they_write_to():
    engine = make_engine(*load_tiny("gqa"), page_size=4)
    engine.add_beam_search("beams", list(range(1, 31)), BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True))
    most_saved = 0
    while engine.has_unfinished:
        engine.step()
        stats = engine.page_stats()
        most_saved = max(most_saved, stats.saved)
        assert stats.used <= 7 + 4 * 4  # the prompt's full pages once
    assert most_saved >= 3 * 7


@pytest.mark.slow
def test_the_sampler_of_other_requests_is_not_disturbed():
    model, params = load_tiny("gqa")
    sampled = SamplingParams(seed=3, max_tokens=12, ignore_eos=True)

    def outputs(beams: bool):
        engine = make_engine(model, params)
        if beams:
            engine.add_beam_search("beams", PROMPT, BeamSearchParams(beam_width=3, max_tokens=9))
        requests = [r for p in (sampled, greedy(12)) for r in engine.add_request("other", PROMPT, p)]
        while engine.has_unfinished:
            engine.step()
        return [r.output_token_ids for r in requests]

    assert outputs(True) == outputs(False)


def test_an_ended_search_leaves_nothing():
    engine = make_engine(*load_tiny("gqa"))
    searching = engine.add_beam_search("beams", PROMPT, BeamSearchParams(beam_width=4, max_tokens=20))
    for _ in range(5):
        engine.step()
    engine.abort_search(searching)
    while engine.has_unfinished:
        engine.step()
    engine.check_integrity()
    assert searching.done and engine.pool.num_used == 0 and not engine._searches


def test_stop_ids_end_beams_and_stay_out_of_the_tokens_unless_asked_for():
    model, params = load_tiny("gqa")
    free = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    (output,) = search(make_engine(model, params), [PROMPT], free)
    stop = output[0].tokens[-3]
    for shown in (False, True):
        stopped = BeamSearchParams(
            beam_width=2, max_tokens=6, ignore_eos=True, stop_token_ids=[stop], include_stop_str_in_output=shown
        )
        (found,) = search(make_engine(model, params), [PROMPT], stopped)
        ended = [s for s in found if s.finish_reason == "stop"]
        assert ended and all(s.stop_reason == stop for s in ended)
        assert all((s.tokens[-1] == stop) == shown for s in ended)


BAD = [
    ({"beam_width": 0}, "beam_width=0; accepted: an integer in 1..128"),
    ({"beam_width": 2.0}, "beam_width=2.0"),
    ({"temperature": 0.5}, "temperature=0.5; accepted: 0"),
    ({"length_penalty": float("inf")}, "length_penalty=inf; accepted: a finite number"),
    ({"early_stopping": "never"}, "early_stopping='never'"),
    ({"max_tokens": 0}, "max_tokens=0"),
    ({"stop": [""]}, "stop="),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_parameters_are_refused(values, message):
    with pytest.raises(ValueError, match=message.replace("..", r"\.\.")):
        BeamSearchParams(**{"beam_width": 2} | values)


def test_searches_that_could_never_fit_are_refused():
    engine = make_engine(*load_tiny("gqa"), max_num_seqs=4, num_pages=30, max_model_len=80)
    with pytest.raises(ValueError, match=r"beam_width=5 may take 5 rows and 15 pages; accepted: up to max_num_seqs=4"):
        engine.add_beam_search("beams", PROMPT, BeamSearchParams(beam_width=5, max_tokens=6))
    with pytest.raises(ValueError, match=r"4 rows and 40 pages; accepted: .* the pool's 29"):
        engine.add_beam_search("beams", PROMPT, BeamSearchParams(beam_width=4, max_tokens=34))
    with pytest.raises(ValueError, match="stop_token_ids has token id 5000"):
        engine.add_beam_search("beams", PROMPT, BeamSearchParams(beam_width=2, stop_token_ids=[5000]))
    assert not engine.has_unfinished
    engine = make_engine(*load_tiny("gqa"), allocation="oracle")
    with pytest.raises(ValueError, match="beams share pages, which allocation='oracle' does not"):
        engine.add_beam_search("beams", PROMPT, BeamSearchParams(beam_width=2))


@pytest.mark.slow
def test_bad_prompts_of_a_list_do_not_lose_the_others(llm):
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    with pytest.warns(UserWarning, match="prompt 1 was refused"):
        outputs = llm.beam_search(["The capital of France is", []], params, use_tqdm=False)
    assert outputs[0].error is None and len(outputs[0].sequences) == 2
    assert outputs[1].sequences == [] and "empty" in outputs[1].error
    with pytest.raises(ValueError, match="empty"):
        llm.beam_search({"prompt_token_ids": []}, params, use_tqdm=False)
