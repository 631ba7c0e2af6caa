"""OpenAI's client, in both its forms: every option of completions and chats, whole and streamed, gives the same."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server_helpers import CAPITAL, DUMMY, KEY, MODEL, SMALL, Running

from pagedjax.llm import LLM
from pagedjax.server.guard import Limits
from pagedjax.server.serving import ChatSettings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}{{ tools }}"
TOOL: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
SCHEMA: Any = {
    "name": "flag",
    "schema": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
}
SHARED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.9, "seed": 5},
    {"n": 3, "seed": 5},
    {"stop": ["e", "\n\n"], "temperature": 0},
    {"presence_penalty": 1.5, "frequency_penalty": -0.5, "temperature": 0},
    {"logit_bias": {"30": 50, "31": -100}, "temperature": 0},
    {"user": "somebody", "temperature": 0},
    {"extra_body": {"top_k": 3, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 1}},
    {
        "extra_body": {
            "min_tokens": 3,
            "ignore_eos": True,
            "stop_token_ids": [30],
            "include_stop_str_in_output": True,
            "seed": 1,
        }
    },
    {"extra_body": {"allowed_token_ids": [30, 31, 32], "skip_special_tokens": False, "seed": 1}},
    {"extra_body": {"bad_words": ["the"], "cache_salt": "salt", "priority": -1, "request_id": "mine", "seed": 1}},
    {"extra_body": {"structured_outputs": {"regex": "[ab]{2}"}, "spaces_between_special_tokens": False, "seed": 1}},
]
COMPLETIONS: list[dict[str, Any]] = [
    *SHARED,
    {"echo": True, "logprobs": 3, "temperature": 0},
    {"best_of": 1, "temperature": 0},
    {"extra_body": {"response_format": {"type": "json_object"}, "add_special_tokens": False}, "temperature": 0},
]
CHATS: list[dict[str, Any]] = [
    *SHARED,
    {"logprobs": True, "top_logprobs": 2, "temperature": 0},
    {"max_completion_tokens": 3, "temperature": 0},
    {"response_format": {"type": "text"}, "temperature": 0},
    {"response_format": {"type": "json_schema", "json_schema": SCHEMA}, "temperature": 0},
    {"tools": [TOOL], "tool_choice": "none", "temperature": 0},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "clock"}}, "temperature": 0},
    {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0},
]


@pytest.fixture(scope="module")
def server(small_smollm2: str) -> Iterator[Running]:
    llm = LLM(small_smollm2, **DUMMY, **SMALL)
    with Running(llm, Limits(api_keys=(KEY,)), chat=ChatSettings(TEMPLATE, "hermes")) as running:
        yield running
        running.idle()


def parts(choice: Any) -> list[tuple[str, Any]]:
    """What a choice or chunk adds, without what is made up anew for every response."""
    said = getattr(choice, "message", None) or getattr(choice, "delta", None)
    text = (said.content if said else choice.text) or ""
    calls = [c.function for c in (said.tool_calls or ())] if said else []
    called = "".join((f.name or "") + (f.arguments or "") for f in calls)
    return [("text", text), ("called", called), ("reason", choice.finish_reason or "")]


def joined(chunks: list[Any]) -> dict[tuple[int, str], str]:
    """Of all choices of responses."""
    made: dict[tuple[int, str], str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        for name, text in parts(choice):
            made[choice.index, name] = made.get((choice.index, name), "") + text
    return made


@pytest.mark.parametrize(
    ("kind", "options"),
    [*(("completions", options) for options in COMPLETIONS), *(("chat", options) for options in CHATS)],
    ids=str,
)
def test_both_clients_whole_and_streamed(server: Running, kind: str, options: dict[str, Any]):
    prompt: dict[str, Any] = {"prompt": CAPITAL} if kind == "completions" else {}
    prompt = prompt or {"messages": [{"role": "user", "content": CAPITAL}]}
    settings = {"model": MODEL, "max_tokens": 6} | prompt | options
    streamed = settings | {"stream": True, "stream_options": {"include_usage": True}}
    access: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": KEY, "max_retries": 0}

    async def ask() -> list[dict[tuple[int, str], str]]:
        async with openai.AsyncOpenAI(**access) as client:
            create: Any = client.completions.create if kind == "completions" else client.chat.completions.create
            return [joined([await create(**settings)]), joined([chunk async for chunk in await create(**streamed)])]

    with openai.OpenAI(**access) as client:
        create: Any = client.completions.create if kind == "completions" else client.chat.completions.create
        whole, chunks = create(**settings), list(create(**streamed))
    assert whole.usage.total_tokens == chunks[-1].usage.total_tokens and chunks[-1].choices == []
    first = joined([whole])
    assert all(made == first for made in (joined(chunks), *asyncio.run(ask())))
    assert len({index for index, _ in first}) == options.get("n", 1)


def test_the_model_is_listed(server: Running):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
