"""The engine on a caller's parameters: shared arrays, updates, released memory, rollouts as arrays."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import greedy, load_tiny, make_engine, run

from pagedjax import LLM, SamplingParams
from pagedjax.models.llama import Llama, LlamaForCausalLM
from pagedjax.models.training import token_logprobs
from pagedjax.weights import flatten

MODEL, PARAMS = load_tiny("gqa")
OTHERS = {name: 1.1 * value for name, value in Llama(MODEL.config).init(7).items()}
PROMPTS = [[5, 9, 2], [17, 4, 88, 23, 61], [3]]
SIZES = {"num_pages": 200, "page_size": 4, "max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 32}


def make_llm(params: Any = PARAMS, **config: Any) -> LLM:
    return LLM.from_params(params, MODEL.config, **{**SIZES, **config})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm()


def tokens_of(llm: LLM, max_tokens: int = 8) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, greedy(max_tokens), use_tqdm=False)]


def test_arrays_that_fit_are_shared():
    weights = make_llm().engine.runner.weights
    assert all(array is PARAMS[name] for name, array in zip(MODEL.shapes, weights.arrays, strict=True))
    fused = make_llm(fuse_projections=True).engine.runner.weights
    shared = [name for name, a in zip(fused.model.shapes, fused.arrays, strict=True) if a is PARAMS.get(name)]
    assert set(shared) == set(fused.model.shapes) & set(MODEL.shapes) and len(shared) < len(fused.arrays)


def test_every_form_of_a_tree_gives_the_same_tokens(llm: LLM):
    module = LlamaForCausalLM(MODEL.config, rngs=nnx.Rngs(0))
    state = nnx.state(module)
    nnx.replace_by_pure_dict(state, nested(PARAMS))
    on_host = {name: np.asarray(value) for name, value in PARAMS.items()}
    expected = tokens_of(llm)
    for tree in (state, nested(PARAMS), on_host):
        llm.update_params(OTHERS)
        llm.update_params(tree)
        assert tokens_of(llm) == expected
    assert tokens_of(make_llm(fuse_projections=True)) == expected


def nested(params: Any) -> dict[Any, Any]:
    """With layers by number, as NNX has them."""
    tree: dict[Any, Any] = {}
    for name, value in params.items():
        *path, last = [int(part) if part.isdecimal() else part for part in name.split(".")]
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({k: v for k, v in PARAMS.items() if k != NORM}, r"params lack 1 of the model's \d+, 'model.norm.weight'"),
        (PARAMS | {"model.bias": PARAMS[NORM]}, "params have 1 that are not part of this LLaMA, 'model.bias'"),
        (PARAMS | {NORM: jnp.ones(3)}, r"params\['model.norm.weight'\] has shape \[3\]; expected \[32\]"),
        (PARAMS | {NORM: jnp.ones(32, int)}, r"params\['model.norm.weight'\] has dtype int32; expected floating"),
        (list(PARAMS.values()), "params is a list; accepted: a dict from names to arrays"),
    ],
)
def test_a_tree_that_is_not_the_model_s_is_refused_and_nothing_changes(llm: LLM, params: Any, words: str):
    before = llm.engine.runner.weights.arrays
    with pytest.raises(ValueError, match=words):
        llm.update_params(params)
    assert llm.engine.runner.weights.arrays is before


def test_params_stand_in_for_a_model():
    with pytest.raises(ValueError, match="model='x'; accepted: params in its stead"):
        make_llm(model="x")


@pytest.mark.parametrize("config", [{}, {"fuse_projections": True}, {"dtype": "bfloat16"}])
def test_new_weights_take_over_without_a_compilation(monkeypatch, config: dict[str, Any]):
    llm = make_llm(**config)
    before = tokens_of(llm)
    count = llm.engine.num_compilations
    with monkeypatch.context() as patched:
        patched.setattr(nnx, "eval_shape", None)  # tracing the model would take longer than all else
        llm.update_params(OTHERS)
    after = tokens_of(llm)
    assert llm.engine.num_compilations == count and after != before
    assert after == tokens_of(make_llm(OTHERS, **config))
    assert llm.engine.runner.weights.arrays[0].dtype == llm.engine.config.dtype


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_every_token_has_the_version_of_the_weights_that_sampled_it(lookahead: int, recompute: bool):
    engine = make_engine(MODEL, PARAMS, lookahead=lookahead)
    old = [r.output_token_ids for r in run(make_engine(MODEL, PARAMS), PROMPTS, greedy(20))]
    requests = [engine.add_request(str(i), prompt, greedy(20))[0] for i, prompt in enumerate(PROMPTS)]
    late = engine.add_request("late", [9, 9], SamplingParams(n=2, seed=1, max_tokens=20, ignore_eos=True))
    for _ in range(7):
        engine.step()
    engine.update_params(OTHERS, recompute)
    engine.check_integrity()
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    assert all(r.policy_versions == sorted(r.policy_versions) and len(r.policy_versions) == 20 for r in late)
    fresh = make_engine(MODEL, OTHERS)
    for request, tokens in zip(requests, old, strict=True):
        first = request.policy_versions.index(1)
        assert first >= 5 and request.policy_versions == [0] * first + [1] * (20 - first)
        assert request.output_token_ids[:first] == tokens[:first]
        (on,) = run(fresh, [request.prompt_token_ids + tokens[:first]], greedy(20 - first))
        assert (request.output_token_ids[first:] == on.output_token_ids) is recompute


def test_a_request_that_waits_gets_the_weights_of_its_time():
    engine = make_engine(MODEL, PARAMS, max_num_seqs=1)
    requests = [engine.add_request(str(i), prompt, greedy(6))[0] for i, prompt in enumerate(PROMPTS)]
    for _ in range(3):
        engine.update_params(OTHERS)
    while engine.has_unfinished:
        engine.step()
    assert [set(r.policy_versions) for r in requests] == [{3}] * 3
    assert run(engine, PROMPTS[:1], greedy(2))[0].policy_versions == [3, 3]


@pytest.mark.slow
def test_pages_in_host_memory_do_not_survive_new_weights():
    engine = make_engine(MODEL, PARAMS, num_pages=13, max_model_len=40, swap_space=0.01, preemption_mode="swap")
    requests = [engine.add_request(str(i), [i] * 9, greedy(20))[0] for i in range(4)]
    swap = engine.scheduler.swap
    while not swap.num_used:
        engine.step()
    engine.update_params(OTHERS)
    assert not swap.num_used
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
    assert all(len(r.output_token_ids) == 20 for r in requests)


def test_prefixes_of_old_weights_are_not_found():
    llm = make_llm()
    llm.generate([[7] * 20], greedy(1), use_tqdm=False)
    llm.update_params(OTHERS)
    (output,) = llm.generate([[7] * 20], greedy(6), use_tqdm=False)
    assert output.num_cached_tokens == 0 and output.outputs[0].policy_versions == [1] * 6


def test_memory_goes_and_comes_back_without_a_compilation(llm: LLM):
    expected, count = tokens_of(llm), llm.engine.num_compilations
    gc.collect()  # pools of other tests' engines
    pool = [array for array in jax.live_arrays() if array.shape[:2] == (200, 2)]
    assert pool
    del pool
    llm.release_memory()
    assert not [array for array in jax.live_arrays() if array.shape[:2] == (200, 2)]
    for call in (llm.engine.step, llm.release_memory, lambda: llm.generate([[1]], use_tqdm=False)):
        with pytest.raises(RuntimeError, match="memory is released; call restore_memory first"):
            call()
    llm.restore_memory()
    with pytest.raises(RuntimeError, match="memory is not released"):
        llm.restore_memory()
    assert tokens_of(llm) == expected and llm.engine.num_compilations == count


def test_memory_is_not_released_under_a_request(llm: LLM):
    requests = llm.engine.add_request("r", [1, 2], greedy(5))
    with pytest.raises(RuntimeError, match="release_memory while requests are unfinished"):
        llm.release_memory()
    llm.engine.abort(requests)
    llm.engine.step()


def test_a_rollout_is_what_generate_gives_as_arrays(llm: LLM):
    params = SamplingParams(n=2, seed=11, temperature=0.8, max_tokens=7, stop_token_ids=list(range(40)))
    batch = llm.rollout(PROMPTS, params, prompt_length=6, pad_token_id=1)
    assert batch.tokens.shape == (6, 13) and batch.tokens.dtype == np.int32
    for row, completion in enumerate(batch.completions):
        prompt = PROMPTS[row // 2]
        alone = SamplingParams(seed=11 + row, temperature=0.8, max_tokens=7, stop_token_ids=list(range(40)))
        (output,) = llm.generate(prompt, alone, use_tqdm=False)
        assert completion == output.outputs[0].token_ids
        end = len(prompt) + len(completion)
        assert batch.tokens[row].tolist() == prompt + completion + [1] * (13 - end)
        assert batch.token_mask[row].tolist() == [True] * end + [False] * (13 - end)
        where = [False] * len(prompt) + [True] * len(completion) + [False] * (13 - end)
        assert batch.completion_mask[row].tolist() == where
        assert (batch.prompt_lens[row], batch.completion_lens[row]) == (len(prompt), len(completion))
        assert ("stop", "length")[batch.finish_reasons[row]] == output.outputs[0].finish_reason
        assert (batch.policy_versions[row] == np.where(where, llm.engine.policy_version, -1)).all()
    assert len(set(batch.finish_reasons.tolist())) == 2


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("config", [{}, {"batch_invariant": True}, {"fuse_projections": True, "num_pages": 21}])
def test_sampler_and_trainer_agree_within_1e_4_in_float32(temperature: float, config: dict[str, Any]):
    params = SamplingParams(n=4, seed=0, temperature=temperature, max_tokens=30, ignore_eos=True)
    batch = make_llm(**config).rollout(PROMPTS, params)
    expected = token_logprobs(MODEL, PARAMS, jnp.asarray(batch.tokens), temperature=temperature)
    apart = np.abs(np.where(batch.completion_mask, batch.logprobs - expected, 0))
    assert apart.max() < 1e-4 and not batch.logprobs[~batch.completion_mask].any()


@pytest.mark.slow
def test_logprobs_are_those_of_the_truncated_distribution(llm: LLM):
    params = SamplingParams(n=4, seed=0, temperature=0.7, top_k=6, top_p=0.8, min_p=0.05, max_tokens=12)
    batch = llm.rollout(PROMPTS[:1], params)
    full = token_logprobs(MODEL, PARAMS, jnp.asarray(batch.tokens), temperature=0.7)
    more = (batch.logprobs - np.asarray(full))[batch.completion_mask]
    assert (more > 0.01).mean() > 0.9 and (batch.logprobs <= 1e-6).all()
    assert (np.exp(batch.logprobs[batch.completion_mask]) >= 1 / 100).all()


def test_a_batch_goes_into_a_jitted_step(llm: LLM):
    batch = llm.rollout(PROMPTS, SamplingParams(max_tokens=4))
    doubled = jax.jit(lambda b: b._replace(tokens=2 * b.tokens))(batch)
    assert (doubled.tokens == 2 * batch.tokens).all() and (doubled.logprobs == batch.logprobs).all()


@pytest.mark.parametrize(
    ("prompts", "params", "padding", "words"),
    [
        ([], {}, {}, "0 prompts of up to 0 tokens; accepted: 1 or more"),
        ([[1, 2, 3]], {}, {"prompt_length": 2}, "1 prompts of up to 3 tokens; accepted: 1 or more, up to 2"),
        ([[1]], {"max_tokens": None}, {}, "max_tokens=None; accepted: an integer"),
        ([[1], [1000]], {}, {}, "prompt 1: prompt_token_ids"),
        ([[1]], {"stop": "x"}, {}, "prompt 0: skip_tokenizer_init=True"),
    ],
)
def test_what_cannot_run_is_refused_and_nothing_is_left(llm: LLM, prompts, params, padding, words: str):
    with pytest.raises(ValueError, match=words):
        llm.rollout(prompts, SamplingParams(**params), **padding)
    llm.engine.step()
    assert not llm.engine.has_unfinished


def test_names_are_joined_by_dots():
    assert flatten({"a": {0: {"w": 1}}, "b.c": 2}) == {"a.0.w": 1, "b.c": 2}
