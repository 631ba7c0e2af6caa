"""Structured output through the server, in every form that clients ask for it."""

import json
import re
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from server_helpers import KEY, MODEL, Running
from test_server import llm  # noqa: F401  (a fixture)

from pagedjax import SamplingParams, StructuredOutputsParams
from pagedjax.server.guard import Limits

pytestmark = pytest.mark.slow
ASK: Any = [{"role": "user", "content": "Describe a person."}]
PERSON: Any = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


def test_offline_use_takes_them_too(llm):  # noqa: F811
    """Before a server has the engine."""
    structured = StructuredOutputsParams(choice=["up", "down"])
    (made,) = llm.generate(["Go"], SamplingParams(temperature=0, structured_outputs=structured), use_tqdm=False)
    assert made.outputs[0].text in ("up", "down") and made.outputs[0].finish_reason == "stop"
    assert SamplingParams.from_dict({"structured_outputs": {"choice": ["up"]}}).structured_outputs is not None


@pytest.fixture(scope="module")
def client(llm):  # noqa: F811
    with Running(llm, Limits(api_keys=(KEY,), max_body=400_000)) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as client:
            yield client
        running.idle()


def test_a_chat_answers_by_a_schema_whole_and_streamed(client):
    settings: dict[str, Any] = {"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 80}
    made = client.chat.completions.create(**settings, response_format=FORMAT).choices[0]
    jsonschema.validate(json.loads(made.message.content), PERSON)
    chunks = client.chat.completions.create(**settings, response_format=FORMAT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == made.message.content
    assert made.finish_reason == "stop"


def test_any_json_object_may_be_asked_for(client):
    made = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, max_tokens=120, response_format={"type": "json_object"}
    )
    text = made.choices[0].message.content
    assert text.lstrip().startswith("{")
    if made.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        ({"regex": r"\d{3}-\d{4}"}, r"\d{3}-\d{4}"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"grammar": 'start: "x=" /[0-9]{1,4}/ ";"'}, r"x=\d+;"),
        ({"json": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}}, r"\[[^]]*\]"),
    ],
    ids=str,
)
def test_completions_take_every_structure(client, structure: dict[str, Any], pattern: str):
    extra = {"structured_outputs": structure}
    made = client.completions.create(model=MODEL, prompt="My number:", n=3, seed=1, max_tokens=40, extra_body=extra)
    whole = [choice.text for choice in made.choices if choice.finish_reason == "stop"]
    assert whole and all(re.fullmatch(pattern, text, re.DOTALL) for text in whole)


def test_the_demo_api_takes_them_too(client):
    body = {"prompt": "Go", "temperature": 0, "structured_outputs": {"choice": ["up", "down"]}}
    url = str(client.base_url).removesuffix("/v1/") + "/generate"
    made = httpx.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert made.json()["text"] in (["Goup"], ["Godown"])


BAD: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "(a"}},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}},
    {"structured_outputs": {"unknown": 1}},
    {"structured_outputs": {"json": {"type": "?"}}},
    {"structured_outputs": {"json": {"$ref": "#"}}},
    {"structured_outputs": {"regex": "a" * 200_000}},
    {"structured_outputs": {"grammar": "start: start start"}},
    {"structured_outputs": {"choice": []}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_object"}, "structured_outputs": {"choice": ["a"]}},
    {"guided_json": {"type": "object"}},
]


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: str(fields)[:60])
def test_what_is_no_structure_is_refused_and_the_server_goes_on(client, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", max_tokens=4, extra_body=fields)
    assert len(caught.value.message) < 900
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices[0].finish_reason == "length"


def test_a_nest_of_schemas_is_refused(client):
    schema: Any = {"type": "string"}
    for _ in range(600):
        schema = {"type": "array", "items": schema}
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="a", extra_body={"structured_outputs": {"json": schema}})
