"""LLM: prompts of every form, order, streaming, chat, stop strings, and what a bad prompt in a list costs."""

import json
import shutil

import numpy as np
import pytest
from helpers import golden, greedy

from pagedjax.llm import LLM
from pagedjax.sampling_params import SamplingParams

SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 96, "page_size": 4, "num_pages": 120}


@pytest.fixture(scope="module")
def llm(text_model):
    return LLM(str(text_model), **SIZES)


def test_outputs_keep_the_order_of_the_prompts_and_equal_transformers(llm):
    prompts = golden("gqa")["prompts"]
    items = [{"prompt_token_ids": p["prompt_ids"]} for p in prompts] + [prompts[1]["prompt_ids"]]
    params = [greedy(len(p["tokens"])) for p in prompts] + [greedy(3)]
    outputs = llm.generate(items, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [p["tokens"] for p in prompts] + [prompts[1]["tokens"][:3]]
    assert [o.prompt_token_ids for o in outputs] == [p["prompt_ids"] for p in prompts] + [prompts[1]["prompt_ids"]]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)


def test_every_form_of_a_prompt_gives_the_same_output(llm):
    ids = llm.get_tokenizer().encode("hello")
    forms = ["hello", {"prompt": "hello"}, {"prompt_token_ids": ids}, ids, np.array(ids), ["hello"]]
    texts = [llm.generate(form, greedy(8), use_tqdm=False)[0].outputs[0].text for form in forms]
    assert len(set(texts)) == 1
    tokens = llm.generate("hello", greedy(8), use_tqdm=False)[0].outputs[0].token_ids
    assert texts[0] == llm.get_tokenizer().decode(tokens)


def test_a_prompt_that_comes_again_is_mostly_cached_but_for_other_tenants_and_after_a_reset(llm):
    ids = list(range(3, 16))

    def generate(**prompt):
        (output,) = llm.generate({"prompt_token_ids": ids, **prompt}, greedy(6), use_tqdm=False)
        return output.num_cached_tokens, output.outputs[0].token_ids

    llm.reset_prefix_cache()
    _, tokens = first = generate()
    assert first[0] == 0
    assert generate() == (12, tokens)
    assert generate(cache_salt="tenant") == (0, tokens) and generate(cache_salt="tenant") == (12, tokens)
    llm.reset_prefix_cache()
    assert generate() == (0, tokens)
    for salt in ("", 3):
        with pytest.raises(ValueError, match=f"cache_salt={salt!r}; accepted: a string that is not empty"):
            generate(cache_salt=salt)


def test_the_next_turn_of_a_conversation_finds_the_pages_of_the_one_before(llm):
    ids = list(range(20, 40))
    (first,) = llm.generate({"prompt_token_ids": ids}, greedy(14), use_tqdm=False)
    turn = ids + first.outputs[0].token_ids + [7]
    (second,) = llm.generate({"prompt_token_ids": turn}, greedy(2), use_tqdm=False)
    assert second.num_cached_tokens == 32  # 20 + 14 tokens in full pages of 4; the last one was never computed


def test_a_stream_grows_to_what_generate_returns(llm):
    prompts = ["one", "another prompt", "x"]
    final = {}
    for output in llm.stream(prompts, greedy(12)):
        before = final.get(output.request_id)
        if before:
            assert output.outputs[0].text.startswith(before.outputs[0].text)
            assert output.outputs[0].token_ids[: len(before.outputs[0].token_ids)] == before.outputs[0].token_ids
        final[output.request_id] = output
    expected = llm.generate(prompts, greedy(12), use_tqdm=False)
    assert [o.outputs[0].text for o in final.values()] == [o.outputs[0].text for o in expected]
    assert all(o.finished for o in final.values())


def test_closing_a_stream_aborts_its_requests(llm):
    stream = llm.stream(["a long one", "and another"], greedy(60))
    next(stream)
    stream.close()
    assert llm.engine.pool.num_used == 0 and not llm.engine.scheduler.running


def test_requests_added_by_hand_survive_a_generate_beside_them(llm):
    ids = llm.get_tokenizer().encode("beside")
    (request,) = llm.engine.add_request("mine", ids, greedy(30))
    llm.generate("hello", greedy(2), use_tqdm=False)
    while llm.engine.has_unfinished:
        llm.engine.step()
    assert request.output_token_ids == llm.generate("beside", greedy(30), use_tqdm=False)[0].outputs[0].token_ids


def test_a_bad_prompt_in_a_list_is_returned_in_its_place_and_the_others_run(llm):
    prompts = ["good", {"prompt_token_ids": [128]}, "", {"prompts": "typo"}, "x" * 96, 7, "fine"]
    with pytest.warns(UserWarning, match="was refused"):
        outputs = llm.generate(prompts, greedy(4), use_tqdm=False)
    errors = [output.error for output in outputs]
    assert errors[0] is None and errors[6] is None and all(errors[1:6])
    assert "token id 128; accepted: 0 to 127" in errors[1]
    assert "prompt is empty" in errors[2] and "accepted: prompt, prompt_token_ids" in errors[3]
    assert "fewer than max_model_len=96" in errors[4]
    assert outputs[0].outputs[0].token_ids == llm.generate("good", greedy(4), use_tqdm=False)[0].outputs[0].token_ids
    assert len(outputs[6].outputs[0].token_ids) == 4


def test_a_bad_prompt_alone_raises(llm):
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.generate("", use_tqdm=False)
    with pytest.raises(ValueError, match=r"prompt_token_ids=\[1.5\]; accepted: integers"):
        llm.generate({"prompt_token_ids": [1.5]}, use_tqdm=False)
    with pytest.raises(ValueError, match="accepted: SamplingParams, a list of them, or None"):
        llm.generate("a", {"temperature": 0}, use_tqdm=False)
    with pytest.raises(ValueError, match="2 entries for 3 prompts"):
        llm.generate(["a", "b", "c"], [greedy(1)] * 2, use_tqdm=False)


def test_the_earliest_stop_string_wins_and_is_cut_from_the_text(llm):
    full = llm.generate("hello", greedy(24), use_tqdm=False)[0].outputs[0].text
    early, late = full[5:8], full[12:15]
    assert full.index(early) < full.index(late)
    params = greedy(24, stop=[late, early])
    output = llm.generate("hello", params, use_tqdm=False)[0].outputs[0]
    assert output.text == full[: full.index(early)]
    assert (output.finish_reason, output.stop_reason) == ("stop", early)
    kept = llm.generate("hello", greedy(24, stop=early, include_stop_str_in_output=True), use_tqdm=False)
    assert kept[0].outputs[0].text == full[: full.index(early) + len(early)]


def test_bad_words_never_appear(llm):
    full = llm.generate("hello", greedy(24), use_tqdm=False)[0].outputs[0].text
    words = [full[3], full[8:11].strip()]
    assert len(words[1]) > 1
    text = llm.generate("hello", greedy(24, bad_words=words), use_tqdm=False)[0].outputs[0].text
    assert not any(word in text for word in words)


def test_parallel_samples_come_back_as_one_output(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    (output,) = llm.generate("hello", params, use_tqdm=False)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3


def test_logprobs_carry_text_and_sum_to_the_cumulative_one(llm):
    completion = llm.generate("hello", greedy(5, logprobs=2), use_tqdm=False)[0].outputs[0]
    chosen = [found[token] for found, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert all(value.decoded_token is not None for value in chosen)
    assert completion.cumulative_logprob == pytest.approx(sum(value.logprob for value in chosen))


def test_chat_goes_through_the_models_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, greedy(4), use_tqdm=False)
    assert output.prompt == "<start>user:hi<end><start>"
    both = llm.chat([messages, [*messages, {"role": "assistant", "content": "ho"}]], greedy(4), use_tqdm=False)
    assert both[0].outputs[0].token_ids == output.outputs[0].token_ids
    assert both[1].prompt == "<start>user:hi<end><start>assistant:ho<end><start>"
    with pytest.raises(ValueError, match="role"):
        llm.chat([{"content": "hi"}], use_tqdm=False)
    with pytest.warns(UserWarning, match="prompt 0 was refused"):
        mixed = llm.chat([[{"content": "hi"}], messages], greedy(4), use_tqdm=False)
    assert "role" in mixed[0].error and mixed[1].outputs[0].token_ids == output.outputs[0].token_ids


def test_without_a_tokenizer_token_ids_go_in_and_out(text_model):
    llm = LLM(str(text_model), skip_tokenizer_init=True, **SIZES)
    output = llm.generate([[5, 6, 7]], greedy(4), use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 4 and output.text == ""
    for prompt, params in (("text", greedy(4)), ([5], greedy(4, stop="x")), ([5], greedy(4, bad_words=["x"]))):
        with pytest.raises(ValueError, match="skip_tokenizer_init=True leaves no tokenizer"):
            llm.generate(prompt, params, use_tqdm=False)


def test_generation_config_gives_the_default_sampling_params_and_eos(text_model, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(text_model, path)
    values = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 5, "eos_token_id": [3, 4], "do_sample": True}
    (path / "generation_config.json").write_text(json.dumps(values))
    llm = LLM(str(path), **SIZES)
    assert llm.default_sampling_params == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=5)
    (request,) = llm.engine.add_request("a", [5], SamplingParams())
    assert request.eos_ids == {3, 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 0}, "page_size=0; accepted: an integer >= 1"),
        ({"max_num_seqs": 64}, "max_num_batched_tokens=32; accepted: at least max_num_seqs=64"),
        ({"dtype": "int8"}, "dtype='int8'; accepted: auto, bfloat16, float16, float32"),
        ({"attention_impl": "magic"}, "attention_impl='magic'; accepted: auto"),
        ({"num_pages": 5}, "max_model_len=96 needs 24 pages"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"lookahead": -1}, "lookahead=-1"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching=1; accepted: True, False or None"),
        ({"allocation": "min"}, "allocation='min'; accepted: paged, max, pow2, oracle, or a class"),
        ({"eviction": "lru"}, "eviction='lru'; accepted: a class like LeastRecentlyUsed"),
        (
            {"allocation": "pow2", "enable_prefix_caching": True},
            "enable_prefix_caching=True; accepted: False or None with allocation='pow2'",
        ),
    ],
)
def test_a_bad_setting_is_refused_by_name(text_model, settings, message):
    with pytest.raises(ValueError, match=message):
        LLM(str(text_model), **{**SIZES, **settings})
