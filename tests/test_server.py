"""The server, over loopback, by OpenAI's own client: what comes back, what is refused, and that nothing is left."""

import asyncio
import gc
import json
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from server_helpers import CAPITAL, KEY, MODEL, SMALL, Running

from pagedjax.demo import demo_model_path
from pagedjax.llm import LLM
from pagedjax.server.guard import Limits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(demo_model_path()), dtype="float32", **SMALL)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with Running(llm, Limits(api_keys=("another", KEY), max_body=100_000)) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client
    server.idle()


@pytest.fixture
def raw(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client
    server.idle()


def test_a_completion_is_what_the_engine_gives_offline(client, llm):
    made = client.completions.create(model=MODEL, prompt=CAPITAL, max_tokens=8, temperature=0)
    (choice,) = made.choices
    assert choice.text.startswith(" Paris") and choice.finish_reason == "length"
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (5, 8, 13)
    assert made.object == "text_completion" and made.id.startswith("cmpl-")


@pytest.mark.slow
def test_choices_are_prompt_major_and_prompts_may_be_ids(client, llm):
    ids = llm.get_tokenizer().encode(CAPITAL)
    more = {"max_tokens": 4, "temperature": 0.9, "seed": 3, "n": 2}
    texts = [c.text for c in client.completions.create(model=MODEL, prompt=[CAPITAL, "Once"], **more).choices]
    assert texts[:2] == [c.text for c in client.completions.create(model=MODEL, prompt=ids, **more).choices]
    assert texts[2:] == [c.text for c in client.completions.create(model=MODEL, prompt=["Once"], **more).choices]
    both = client.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=3, temperature=0)
    assert [c.index for c in both.choices] == [0, 1] and both.choices[0].text == both.choices[1].text


def test_a_stream_gives_the_same_text_and_its_usage_last(client):
    settings = {"model": MODEL, "prompt": CAPITAL, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**settings).choices[0].text
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole and len(chunks) > 4
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12


def test_echo_and_logprobs_have_openais_form(client):
    made = client.completions.create(model=MODEL, prompt=CAPITAL, max_tokens=2, temperature=0, echo=True, logprobs=2)
    (choice,) = made.choices
    assert choice.text.startswith(CAPITAL)
    found = choice.logprobs
    assert len(found.tokens) == 5 + 2 and found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert all(len(tops) in (2, 3) for tops in found.top_logprobs[1:])
    assert "".join(found.tokens) == choice.text
    assert [choice.text[o:].startswith(t) for o, t in zip(found.text_offset, found.tokens, strict=True)] == [True] * 7
    only = client.completions.create(model=MODEL, prompt=CAPITAL, max_tokens=0, echo=True, logprobs=0)
    assert only.choices[0].text == CAPITAL and only.usage.completion_tokens == 0
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(found.token_logprobs[1:5], abs=1e-4)


def test_chat_answers_streamed_and_whole(client):
    messages = [{"role": "user", "content": "What is the boiling point of water at sea level? Be terse."}]
    settings: Any = {"model": MODEL, "messages": messages, "temperature": 0, "max_completion_tokens": 16}
    made = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    (choice,) = made.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert made.object == "chat.completion" and len(choice.logprobs.content) == made.usage.completion_tokens
    first = choice.logprobs.content[0]
    assert len(first.top_logprobs) == 3 and first.top_logprobs[0].token == first.token
    assert bytes(first.bytes).decode() == first.token
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content
    parts = [{"type": "text", "text": messages[0]["content"]}]
    again = client.chat.completions.create(**settings | {"messages": [{"role": "user", "content": parts}]})
    assert again.choices[0].message.content == choice.message.content


def test_stop_strings_end_the_text(client):
    whole = client.completions.create(model=MODEL, prompt=CAPITAL, max_tokens=12, temperature=0).choices[0].text
    stop = whole[4:7]
    choice = client.completions.create(model=MODEL, prompt=CAPITAL, max_tokens=12, temperature=0, stop=[stop]).choices[
        0
    ]
    assert choice.text == whole[: whole.index(stop)] and choice.finish_reason == "stop"
    more = {"include_stop_str_in_output": True}
    settings: Any = {"model": MODEL, "prompt": CAPITAL, "max_tokens": 12, "temperature": 0, "stop": stop}
    shown = client.completions.create(**settings, extra_body=more).choices[0]
    assert shown.text == whole[: whole.index(stop)] + stop


@pytest.mark.slow
def test_the_async_client_runs_many_at_a_time(server):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            settings: Any = {"model": MODEL, "prompt": CAPITAL, "max_tokens": 6, "temperature": 0}
            made = await asyncio.gather(*(client.completions.create(**settings) for _ in range(20)))
            return [m.choices[0].text for m in made]

    assert len(set(asyncio.run(run()))) == 1
    server.idle()


def test_the_other_routes(raw, llm):
    assert raw.get("/health").status_code == 200
    assert raw.get("/version").json()["version"]
    (card,) = raw.get("/v1/models").json()["data"]
    assert card["id"] == MODEL and card["max_model_len"] == SMALL["max_model_len"]
    ids = llm.get_tokenizer().encode(CAPITAL)
    found = raw.post("/tokenize", json={"prompt": CAPITAL}).json()
    assert found == {"tokens": ids, "count": 5, "max_model_len": SMALL["max_model_len"]}
    assert raw.post("/detokenize", json={"tokens": ids}).json() == {"prompt": CAPITAL}
    chat = raw.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()["tokens"]
    assert chat == llm.chat_prompt([{"role": "user", "content": "Hi"}])["prompt_token_ids"]


def test_the_demo_api(raw):
    body = {"prompt": CAPITAL, "max_tokens": 6, "temperature": 0}
    (text,) = raw.post("/generate", json=body).json()["text"]
    assert text.startswith(CAPITAL + " Paris")
    lines = [json.loads(line) for line in raw.post("/generate", json=body | {"stream": True}).text.splitlines()]
    assert lines[-1]["text"] == [text] and len(lines) > 2
    assert all(later["text"][0].startswith(line["text"][0]) for line, later in pairwise(lines))
    answer = raw.post("/generate", json=body | {"no_such_field": 1})
    assert answer.status_code == 400 and "no_such_field" in answer.json()["error"]["message"]


def test_metrics_count_what_was_done(client, raw):
    def values() -> dict[str, float]:
        lines = [line for line in raw.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = values()
    client.completions.create(model=MODEL, prompt=CAPITAL, max_tokens=7, temperature=0)
    after = values()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["pagedjax:prompt_tokens_total"] == 5 and grown["pagedjax:generation_tokens_total"] == 7
    assert grown['pagedjax:request_success_total{finished_reason="length"}'] == 1
    assert grown["pagedjax:e2e_request_latency_seconds_count"] == 1
    assert after["pagedjax:num_requests_running"] == after["pagedjax:kv_cache_usage_perc"] == 0
    for name in ("num_requests_waiting", "num_preemptions_total", "prefix_cache_queries_total"):
        assert f"pagedjax:{name}" in after
    for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "iteration_tokens_total"):
        assert grown[f"pagedjax:{name}_count"] >= 1


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"temperature": 3}, 400, "temperature"),
    ({"n": 0}, 400, "n"),
    ({"n": 10_000}, 400, "n"),
    ({"best_of": 5}, 400, "best_of"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"logprobs": 1000}, 400, "logprobs"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"stop": [""]}, 400, "stop"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": [10**9]}, 400, "prompt_token_ids"),
    ({"prompt": "word " * 600}, 400, "the prompt has"),
    ({"prompt": [5] * 600}, 400, "the prompt has"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"bad_words": ["w"] * 5000}, 400, "bad_words"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"suffix": "end"}, 400, "suffix"),
    ({"chat_template": "{{ 1 }}"}, 400, "chat_template"),
    ({"guided_json": {}}, 400, "guided_json"),
    ({"model": "another"}, 404, "another"),
]


@pytest.mark.parametrize(("change", "status", "word"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused_by_name(raw, change, status, word, stream):
    if stream and "stream_options" in change:
        return
    answer = raw.post("/v1/completions", json={"model": MODEL, "prompt": CAPITAL, "stream": stream} | change)
    error = answer.json()["error"]
    assert answer.status_code == status == error["code"] and set(error) == {"message", "type", "param", "code"}
    assert word in error["message"] and len(error["message"]) <= 500
    assert raw.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 50_000, b"null", b'{"prompt": NaN}', b"\xff\xfe", b'"text"'])
def test_bodies_that_are_no_requests_are_errors_in_openais_form(raw, content):
    answer = raw.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500 and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_leaves_frees_its_pages(server, raw):
    body = {"prompt": CAPITAL, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with raw.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    server.idle()
    with pytest.raises(httpx.ReadTimeout):
        raw.post("/v1/completions", json=body | {"stream": False}, timeout=0.3)
    server.idle()


def test_more_requests_than_may_be_are_told_to_retry(llm):
    with Running(llm, Limits(), max_requests=1) as server:
        body = {"prompt": CAPITAL, "max_tokens": 300, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()  # closing it would leave
            next(lines)
            refused = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert refused.status_code == 503 and refused.headers["Retry-After"]
            assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        server.idle()


def test_a_request_may_take_only_so_long(llm):
    with Running(llm, Limits(timeout=0.3)) as server:
        body = {"prompt": CAPITAL, "max_tokens": 400, "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 504
        text = httpx.post(f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=60).text
        assert "the request took too long" in text and text.endswith("data: [DONE]\n\n")
        server.idle()


@pytest.mark.slow
def test_a_failed_engine_fails_its_requests_and_health(monkeypatch):
    llm = LLM(str(demo_model_path()), dtype="float32", **SMALL)
    with Running(llm, Limits()) as server:
        steps = llm.engine.step
        count = iter(range(1000))

        def fail() -> Any:
            if next(count) > 3:
                raise RuntimeError("a secret of the server")
            return steps()

        monkeypatch.setattr(llm.engine, "step", fail)
        body = {"prompt": CAPITAL, "max_tokens": 50, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 500 and "secret" not in answer.text
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 500
        assert httpx.get(f"{server.url}/health").status_code == 503


def test_stopping_ends_what_is_under_way_first(llm):
    with Running(llm, Limits()) as server:
        body = {"prompt": CAPITAL, "max_tokens": 40, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.should_exit = True
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_a_server_that_has_ended_keeps_nothing(text_model):
    llm = LLM(str(text_model), dtype="float32", max_model_len=64, num_pages=20)
    with Running(llm, Limits()) as server:
        body = {"prompt": "a", "max_tokens": 2, "temperature": 0}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 200
    engine = weakref.ref(llm.engine)
    del llm, server
    gc.collect()
    assert engine() is None
