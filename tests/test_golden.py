"""The demo model, a real LLaMA, against transformers' stored values (`tests/golden/README.md`)."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from helpers import GOLDEN, assert_equal_up_to_near_tie, causal_logits, greedy

from pagedjax.demo import demo_model_path
from pagedjax.llm import LLM
from pagedjax.sampling_params import SamplingParams

DATA = json.loads((GOLDEN / "smollm2.json").read_text())
PROMPTS = {prompt["name"]: prompt for prompt in DATA["prompts"]}
SHORT = [name for name, prompt in PROMPTS.items() if len(prompt["prompt_ids"]) < 80]

# bfloat16 keeps 8 bits: logits between 16 and 32 are 0.125 apart where transformers rounds them, and 30 layers of
# rounded activations move them by about as much again. A margin above this cannot be turned by two such errors.
BFLOAT16_NEAR_TIE = 0.5


def load(dtype: str, **options: Any) -> LLM:
    return LLM(
        str(demo_model_path()),
        dtype=dtype,
        **{"max_model_len": 1024} | options,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        num_pages=280,
        max_logprobs=-1,
    )


@pytest.fixture(scope="module")
def llm():
    return load("float32", max_model_len=128)


@pytest.fixture(scope="module")
def long_llm():
    return load("float32", max_model_len=768)


def test_the_tokenizer_gives_transformers_token_ids(llm):
    for prompt in PROMPTS.values():
        assert llm.get_tokenizer().encode(prompt["text"]) == prompt["prompt_ids"]
        if prompt["messages"]:
            assert llm.chat_prompt(prompt["messages"])["prompt_token_ids"] == prompt["prompt_ids"]
    assert PROMPTS["capital"]["prompt_ids"] == [504, 3575, 282, 4649, 314]


@pytest.mark.parametrize(
    ("engine", "names"), [("llm", SHORT), pytest.param("long_llm", list(PROMPTS), marks=pytest.mark.slow)]
)
def test_greedy_tokens_equal_transformers_for_all_prompts_in_one_batch(request, engine, names):
    llm = request.getfixturevalue(engine)
    items = [{"prompt_token_ids": PROMPTS[name]["prompt_ids"]} for name in names]
    for name, output in zip(names, llm.generate(items, greedy(48), use_tqdm=False), strict=True):
        assert output.outputs[0].token_ids == PROMPTS[name]["tokens"], name
    assert llm.engine.pool.num_used == 0


@pytest.mark.slow
def test_logits_of_the_last_position_equal_transformers(llm):
    """Through the model directly; 17.3713 (' Paris'), 14.8886 (' the') and 13.2450 (' London') among them."""
    model, flat = llm.engine.runner.model, llm.engine.runner.weights.arrays
    params = dict(zip(model.shapes, flat, strict=True))
    for name in ("capital", "chinese_emoji", "chat_turns"):
        prompt = PROMPTS[name]
        logits = np.asarray(causal_logits(model, params, prompt["prompt_ids"])[-1])
        np.testing.assert_allclose(logits[prompt["top_ids"]], prompt["top_logits"], atol=1e-3)
        np.testing.assert_allclose(logits[DATA["fixed_ids"]], prompt["fixed_logits"], atol=1e-3)
    paris = dict(zip(PROMPTS["capital"]["top_ids"], PROMPTS["capital"]["top_logits"], strict=True))
    assert paris[7042] == pytest.approx(17.3713, abs=1e-3)


@pytest.mark.slow
def test_paged_logits_equal_transformers_up_to_the_softmax_constant(long_llm):
    params = greedy(1, logprobs=-1)
    items = [{"prompt_token_ids": prompt["prompt_ids"]} for prompt in PROMPTS.values()]
    for prompt, output in zip(PROMPTS.values(), long_llm.generate(items, params, use_tqdm=False), strict=True):
        found = output.outputs[0].logprobs[0]
        ids = prompt["top_ids"] + DATA["fixed_ids"]
        logits = np.array(prompt["top_logits"] + prompt["fixed_logits"])
        logprobs = np.array([found[i].logprob for i in ids])
        assert np.ptp(logits - logprobs) < 1e-3, prompt["name"]


def test_prompt_logprobs_equal_transformers(llm):
    chosen = [prompt for prompt in PROMPTS.values() if prompt["prompt_logprobs"]]
    items = [{"prompt_token_ids": prompt["prompt_ids"]} for prompt in chosen]
    outputs = llm.generate(items, greedy(1, prompt_logprobs=0), use_tqdm=False)
    for prompt, output in zip(chosen, outputs, strict=True):
        pairs = zip(prompt["prompt_ids"][1:], output.prompt_logprobs[1:], strict=True)
        np.testing.assert_allclose([found[t].logprob for t, found in pairs], prompt["prompt_logprobs"], atol=1e-3)


@pytest.mark.gpu
def test_bfloat16_tokens_on_a_gpu_equal_transformers_up_to_the_first_near_tie():
    """Both of transformers' runs: in float32, and in bfloat16, whose own rounding is no nearer to ours."""
    assert jax.default_backend() == "gpu"
    llm = load("bfloat16")
    items = [{"prompt_token_ids": prompt["prompt_ids"]} for prompt in PROMPTS.values()]
    outputs = llm.generate(items, greedy(48), use_tqdm=False)
    for kind in ("", "bfloat16_"):
        compared = 0
        for prompt, output in zip(PROMPTS.values(), outputs, strict=True):
            tokens, margins = prompt[f"{kind}tokens"], prompt[f"{kind}margins"]
            compared += assert_equal_up_to_near_tie(output.outputs[0].token_ids, tokens, margins, BFLOAT16_NEAR_TIE)
        print(f"free running: {compared} {kind}tokens of {48 * len(PROMPTS)} before the first near-tie, all equal")
        assert compared > 0


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_ranks_transformers_tokens_first_where_the_margin_is_clear():
    """Every position, given transformers' own tokens before it: near-ties do not end the comparison."""
    llm = load("bfloat16")
    items = [{"prompt_token_ids": prompt["prompt_ids"] + prompt["tokens"]} for prompt in PROMPTS.values()]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    clear = total = agree = 0
    for prompt, output in zip(PROMPTS.values(), llm.generate(items, params, use_tqdm=False), strict=True):
        found = output.prompt_logprobs[len(prompt["prompt_ids"]) :]
        for token, margin, values in zip(prompt["tokens"], prompt["margins"], found, strict=True):
            first = values[token].rank == 1
            total, agree = total + 1, agree + first
            if margin > BFLOAT16_NEAR_TIE:
                clear += 1
                assert first, (prompt["name"], token, margin)
    print(f"teacher forced: {agree} of {total} tokens rank first, {clear} of them clear of a near-tie")
    assert clear > total / 2


def forced_logprobs(llm: LLM, prompts: list[list[int]], last: int) -> np.ndarray:
    """Log-probabilities of the last tokens of each prompt."""
    items = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(items, greedy(1, prompt_logprobs=0), use_tqdm=False)
    pairs = [zip(p[-last:], o.prompt_logprobs[-last:], strict=True) for p, o in zip(prompts, outputs, strict=True)]
    return np.array([[values[token].logprob for token, values in pair] for pair in pairs])


@pytest.mark.gpu
def test_kernels_on_a_gpu_give_the_tokens_and_logprobs_of_the_reference_attention():
    """bfloat16: tokens up to the first near-tie, then 1280 tokens, each given the reference's own tokens before it."""
    items = [{"prompt_token_ids": prompt["prompt_ids"]} for prompt in PROMPTS.values()]
    kernels, reference = load("bfloat16", attention_impl="mosaic"), load("bfloat16", attention_impl="reference")
    found, expected = (
        [output.outputs[0] for output in llm.generate(items, greedy(128, logprobs=2), use_tqdm=False)]
        for llm in (kernels, reference)
    )
    compared, errors = 0, []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs is not None and theirs.logprobs is not None
        tops = [sorted((value.logprob for value in values.values()), reverse=True) for values in theirs.logprobs]
        margins = [top[0] - top[1] for top in tops]
        compared += assert_equal_up_to_near_tie(ours.token_ids, theirs.token_ids, margins, BFLOAT16_NEAR_TIE)
        same = next((i for i in range(128) if ours.token_ids[i] != theirs.token_ids[i]), 128)
        pairs = zip(theirs.token_ids[:same], ours.logprobs[:same], theirs.logprobs[:same], strict=True)
        errors += [abs(a[token].logprob - b[token].logprob) for token, a, b in pairs]
    print(f"decoding: {compared} of 1280 tokens before the first near-tie, all equal")
    print(f"logprobs of {len(errors)} equal tokens differ by {np.mean(errors):.4f}, {max(errors):.3f} at most")
    assert max(errors) < BFLOAT16_NEAR_TIE / 2
    forced = [
        prompt["prompt_ids"] + output.token_ids for prompt, output in zip(PROMPTS.values(), expected, strict=True)
    ]
    errors = np.abs(forced_logprobs(kernels, forced, 128) - forced_logprobs(reference, forced, 128))
    print(f"teacher forced: {errors.size} logprobs differ by {errors.mean():.4f}, {errors.max():.3f} at most")
    assert errors.size == 1280 and errors.max() < BFLOAT16_NEAR_TIE / 2
