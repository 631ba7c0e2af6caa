"""Programs that people point at a server like this one: LangChain, and EleutherAI's evaluation harness.

The harness runs as a process of its own, with no way to anything but the server.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_helpers import CAPITAL, KEY, MODEL, SMALL, Running

from pagedjax.demo import demo_model_path
from pagedjax.llm import LLM
from pagedjax.sampling_params import SamplingParams
from pagedjax.server.guard import Limits

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the clients' own
QUESTION = "What is the capital of France? Answer in one word."
# What is computed beside what changes float32's summation order; sums of a few log-probabilities of order 1.
CLOSE = 1e-3


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(demo_model_path()), dtype="float32", **SMALL)


@pytest.fixture
def server(llm: LLM) -> Iterator[Running]:
    with Running(llm, Limits(api_keys=(KEY,))) as running:
        yield running
        running.idle()


@pytest.fixture
def settings(server: Running) -> Iterator[dict[str, Any]]:
    """Of LangChain's models; HTTP clients among them, since LangChain closes none of its own."""
    with httpx.Client() as client:
        clients = {"http_client": client, "http_async_client": httpx.AsyncClient()}
        yield {
            "base_url": f"{server.url}/v1",
            "api_key": KEY,
            "model": MODEL,
            "temperature": 0,
            "max_retries": 0,
        } | clients


async def closing(answer: Coroutine[Any, Any, Any], settings: dict[str, Any]) -> Any:
    async with settings["http_async_client"]:
        return await answer


def test_langchain_chats_whole_streamed_and_at_once(settings: dict[str, Any]):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(max_tokens=12, **settings)
    whole = chat.invoke([("system", "You know much."), ("human", QUESTION)])
    assert "Paris" in str(whole.content) and whole.response_metadata["finish_reason"] in ("stop", "length")
    usage = whole.usage_metadata
    assert usage and usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    text = chat.invoke(QUESTION).content
    chunks = list(chat.stream(QUESTION))
    assert "".join(str(chunk.content) for chunk in chunks) == text and len(chunks) > 2
    counted = [chunk.usage_metadata for chunk in chat.stream(QUESTION, stream_usage=True)]
    assert [u["output_tokens"] for u in counted if u][-1] > 0
    assert [m.content for m in chat.batch([QUESTION] * 3)] == [text] * 3
    assert asyncio.run(closing(chat.ainvoke(QUESTION), settings)).content == text
    likely = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert len(likely.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert "Paris" not in str(chat.bind(stop=["Paris"]).invoke(QUESTION).content)


def test_langchain_completes_whole_and_streamed(settings: dict[str, Any]):
    model = pytest.importorskip("langchain_openai").OpenAI(max_tokens=8, **settings)
    text = model.invoke(CAPITAL)
    assert text.startswith(" Paris") and "".join(model.stream(CAPITAL)) == text
    made = model.generate([CAPITAL, CAPITAL])
    assert [g[0].text for g in made.generations] == [text] * 2
    assert made.llm_output and made.llm_output["token_usage"]["completion_tokens"] == 16
    assert asyncio.run(closing(model.ainvoke(CAPITAL), settings)) == text
    assert not model.invoke(CAPITAL, stop=[" Paris"])


CHOICES = [
    {"question": "The capital of France is", "choices": ["Paris", "a kind of cheese", "Ouagadougou"], "answer": 0},
    {"question": "Water is made of hydrogen and", "choices": ["plastic", "oxygen"], "answer": 1},
    {"question": "The opposite of hot is", "choices": ["cold", "seventeen"], "answer": 0},
]
CHOICE_TASK = """
task: choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
TEXT_TASK = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 12, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of the harness's tasks, with their data."""
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps(row) for row in CHOICES))
    for name, text in (("choose", CHOICE_TASK), ("write", TEXT_TASK)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    return tmp_path


def harness(kind: str, tasks: Path, names: str, settings: dict[str, Any], *options: str) -> dict[str, Any]:
    """Runs the harness; returns its results, and by each task's name its samples."""
    pytest.importorskip("lm_eval")
    out = tasks / "out"
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    alone = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    folders = {"HF_HOME": str(tasks / "hub"), "OPENAI_API_KEY": KEY}
    args = ",".join(f"{name}={value}" for name, value in settings.items())
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        kind,
        "--model_args",
        args,
        "--tasks",
        names,
        "--log_samples",
    ]
    command += ["--include_path", str(tasks), "--output_path", str(out), *options]
    env = os.environ | nowhere | alone | folders
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = {"results": json.loads(next(out.rglob("results_*.json")).read_text())["results"]}
    for name in names.split(","):
        lines = next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        found[name] = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    return found


def likelihood(llm: LLM, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, and whether it is the greedy one, without a server."""
    tokenizer = llm.get_tokenizer()
    ids, num_context = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    (output,) = llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=1))
    known: Any = output.prompt_logprobs
    found = [known[i][ids[i]] for i in range(num_context, len(ids))]
    return sum(one.logprob for one in found), all(one.rank == 1 for one in found)


@pytest.mark.parametrize("more", [{"num_concurrent": 4}, {"tokenized_requests": False}, {}])
def test_the_harness_finds_the_likelihoods_that_the_engine_has(llm: LLM, tasks: Path, more: dict[str, Any]):
    folder = tasks / "tokenizer"
    llm.get_tokenizer().hf.save_pretrained(folder)
    with Running(llm, Limits(api_keys=(KEY,))) as server:
        settings = {"model": MODEL, "base_url": f"{server.url}/v1/completions", "tokenizer": folder}
        settings |= {"tokenizer_backend": "huggingface", "max_length": SMALL["max_model_len"]} | more
        batch = ["--batch_size", "1" if more else "4"]
        found = harness("local-completions", tasks, "choose,write", settings, *batch)
        server.idle()
    assert found["results"]["choose"]["acc,none"] == 1
    for row, sample in zip(CHOICES, found["choose"], strict=True):
        pairs = [(row["question"], f" {choice}") for choice in row["choices"]]
        for (context, continuation), (value, greedy) in zip(pairs, sample["filtered_resps"], strict=True):
            expected, is_greedy = likelihood(llm, context, continuation)
            assert float(value) == pytest.approx(expected, abs=CLOSE) and greedy in (is_greedy, str(is_greedy))
    texts = [sample["filtered_resps"][0] for sample in found["write"]]
    params = SamplingParams(temperature=0, max_tokens=12, stop=["\n", ".", "<|im_end|>"])
    offline = llm.generate([row["question"] for row in CHOICES], params)
    assert texts == [output.outputs[0].text for output in offline] and texts[0].startswith(" Paris")


def test_the_harness_chats(llm: LLM, server: Running, tasks: Path):
    settings = {"model": MODEL, "base_url": f"{server.url}/v1/chat/completions", "num_concurrent": 2}
    found = harness("local-chat-completions", tasks, "write", settings, "--apply_chat_template")
    texts = [sample["filtered_resps"][0] for sample in found["write"]]
    assert len(texts) == len(CHOICES) and "cold" in texts[2]
