"""Tool calls: what is read from a model's text, however it is cut, and calls through the server."""

import json
from typing import Any

import jsonschema
import openai
import pytest
from server_helpers import KEY, MODEL, Running
from test_server import llm  # noqa: F401  (a fixture)

from pagedjax.server.guard import Limits
from pagedjax.server.serving import ChatSettings
from pagedjax.server.tools import HermesReader, ListReader, LlamaReader, NamedReader, Reader, find_parser

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
CITY |= {"additionalProperties": False}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Today's.", "parameters": CITY}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
ASK: Any = [{"role": "user", "content": "How is the weather in Rome?"}]
TEMPLATE = """{% if tools %}Tools: {{ tools | tojson }}
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def read(reader: Reader, text: str, size: int) -> tuple[str, list[tuple[str, Any]]]:
    """What comes of a text in pieces of so many characters; arguments that come in pieces are joined."""
    content, calls = "", {}
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    for i, piece in enumerate(pieces):
        said, made = reader.read(piece, last=i == len(pieces) - 1)
        content += said
        for call in made:
            name, arguments = calls.get(call["index"], (call["function"].get("name"), ""))
            calls[call["index"]] = name, arguments + call["function"]["arguments"]
    return content, [(name, json.loads(arguments)) for name, arguments in calls.values()]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call", "no call", []),
        (CALL, "", [("f", {"x": 1})]),
        ("Let me see. " + CALL, "Let me see. ", [("f", {"x": 1})]),
        (CALL + "\n" + CALL.replace("f", "g"), "", [("f", {"x": 1}), ("g", {"x": 1})]),
        (CALL.removesuffix("\n</tool_call>"), "", [("f", {"x": 1})]),
        ("a < b <tool", "a < b <tool", []),
        ("<tool_call>not JSON</tool_call> and on", "<tool_call>not JSON</tool_call> and on", []),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    ],
)
def test_hermes_calls_stand_between_tags(text: str, content: str, calls: list[Any], size: int):
    assert read(HermesReader(), text, size) == (content, calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call", "no call", []),
        ('{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
        ('<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [("f", {}), ("g", {})]),
        ('{"city": "Rome"}', '{"city": "Rome"}', []),
        ("{ not JSON", "{ not JSON", []),
        ("<|pyth", "<|pyth", []),
    ],
)
def test_llama_calls_are_json_objects(text: str, content: str, calls: list[Any], size: int):
    assert read(LlamaReader(), text, size) == (content, calls)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_that_were_asked_for(size: int):
    text = '[{"name": "f", "parameters": {"x": [1, 2]}}, {"name": "g", "parameters": {"y": "]"}}]'
    assert read(ListReader(), text, size) == ("", [("f", {"x": [1, 2]}), ("g", {"y": "]"})])
    assert read(NamedReader("h"), '{"x": 1}', size) == ("", [("h", {"x": 1})])


def test_a_template_tells_how_its_model_calls():
    assert find_parser(TEMPLATE) == "hermes"
    assert find_parser('{% if tools %}... {"name": ..., "parameters": ...}{% endif %}') == "llama3_json"
    assert find_parser("{{ messages }}") is None and find_parser("") is None


@pytest.fixture(scope="module")
def client(llm):  # noqa: F811
    with Running(llm, Limits(api_keys=(KEY,)), chat=ChatSettings(TEMPLATE)) as running:
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0) as client:
            yield client
        running.idle()


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


@pytest.mark.slow
def test_a_named_function_gets_arguments_that_fit(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    made = client.chat.completions.create(model=MODEL, messages=ASK, tools=[CLOCK, WEATHER], tool_choice=choice)
    ((name, arguments),) = calls_of(made.choices[0].message)
    jsonschema.validate(arguments, CITY)
    assert name == "weather" and made.choices[0].finish_reason == "stop" and made.choices[0].message.content is None


@pytest.mark.slow
def test_a_required_call_is_one_of_the_tools(client):
    settings = {"model": MODEL, "messages": ASK, "tools": [CLOCK, WEATHER], "tool_choice": "required", "seed": 3}
    made = client.chat.completions.create(**settings, parallel_tool_calls=False, max_tokens=200)
    ((name, arguments),) = calls_of(made.choices[0].message)
    jsonschema.validate(arguments, CITY if name == "weather" else {"type": "object"})
    assert made.choices[0].finish_reason == "tool_calls" and made.choices[0].message.tool_calls[0].id


@pytest.mark.slow
def test_a_stream_of_calls_joins_to_the_same(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    settings = {"model": MODEL, "messages": ASK, "tools": [WEATHER], "temperature": 0}
    for tool_choice in (choice, "required"):
        whole = client.chat.completions.create(**settings, tool_choice=tool_choice, max_tokens=60).choices[0]
        name = arguments = ""
        chunks = client.chat.completions.create(**settings, tool_choice=tool_choice, max_tokens=60, stream=True)
        for chunk in chunks:
            for call in chunk.choices[0].delta.tool_calls or ():
                name += call.function.name or ""
                arguments += call.function.arguments
            reason = chunk.choices[0].finish_reason
        if whole.message.tool_calls:
            first = whole.message.tool_calls[0].function
            assert arguments.startswith(first.arguments) and name.startswith("weather")
        assert reason == whole.finish_reason


@pytest.mark.slow
def test_a_model_may_call_by_itself(client):
    """After a conversation in which it always did."""
    history: list[Any] = []
    for city in ("Paris", "Rome", "Paris", "Rome", "Paris"):
        call = {"id": "call_0", "type": "function"} | {
            "function": {"name": "weather", "arguments": json.dumps({"city": city})}
        }
        history += [{"role": "user", "content": f"How is the weather in {city}?"}]
        history += [{"role": "assistant", "content": "", "tool_calls": [call]}]
    settings = {"model": MODEL, "messages": [*history, *ASK], "tools": [WEATHER], "temperature": 0, "max_tokens": 60}
    choice = client.chat.completions.create(**settings).choices[0]
    assert calls_of(choice.message) == [("weather", {"city": "Rome"})] and choice.finish_reason == "tool_calls"
    chunks = list(client.chat.completions.create(**settings, stream=True))
    assert [c.choices[0].finish_reason for c in chunks][-1] == "tool_calls"
    text = client.chat.completions.create(**settings | {"tool_choice": "none"}).choices[0]
    assert text.message.tool_calls is None and "<tool_call>" in text.message.content


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "auto"},
        {"tools": []},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "unknown"}}},
        {"tools": [WEATHER], "response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "not a name"}}]},
        {"tools": [WEATHER] * 200},
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "?"}}}],
            "tool_choice": "required",
        },
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_what_cannot_be_used_is_refused(client, fields):
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=ASK, **fields)


@pytest.mark.slow
def test_a_model_without_a_place_for_tools_says_so(llm):  # noqa: F811
    with Running(llm, Limits(api_keys=(KEY,))) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
        settings: Any = {"model": MODEL, "messages": ASK, "tools": [WEATHER], "max_tokens": 3}
        with pytest.raises(openai.BadRequestError, match="no place for them"):
            client.chat.completions.create(**settings)
        assert client.chat.completions.create(**settings, tool_choice="none").choices[0].message.content
        client.close()
