"""Tool calls: what clients offer, what a model may say of it, and what it has said.

A model calls as its chat template taught it to (`auto`), and its text is read by a reader of that form. Where a call is
asked for, the output is constrained: to a list of calls (`required`), or to one function's arguments.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field

MAX_TOOLS = 128
NAME = r"^[a-zA-Z0-9_-]{1,64}$"
HERMES, LLAMA3 = "hermes", "llama3_json"
OPEN, CLOSE, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"


class Function(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=NAME)


class NamedTool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionName


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: str


class ToolCall(BaseModel):
    """One that the assistant has made, in a conversation."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it: arguments as an object. ValueError if they are none."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError("tool_calls has arguments that are no JSON; accepted: an object's text") from error
        function = {"name": self.function.name, "arguments": arguments}
        return {"type": self.type, "function": function} | ({"id": self.id} if self.id else {})


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class Toolbox:
    """The tools of one request, and how it wants them used. ValueError if that cannot be."""

    def __init__(self, tools: Sequence[Tool], choice: ToolChoice, parallel: bool):
        self.tools, self.choice, self.parallel = tools, choice, parallel
        names = [tool.function.name for tool in tools]
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"tool_choice={choice.function.name!r}; accepted: one of the tools, {names!r:.200}")

    @property
    def is_constrained(self) -> bool:
        return self.choice not in ("auto", "none")

    def templated(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def schema(self) -> dict[str, Any]:
        """Of the whole output, where a call is asked for."""
        if isinstance(self.choice, NamedTool):
            name = self.choice.function.name
            return next(_parameters(tool.function) for tool in self.tools if tool.function.name == name)
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": _parameters(tool.function)},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for tool in self.tools
        ]
        most = {} if self.parallel else {"maxItems": 1}
        return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **most}

    def reader(self, parser: str | None) -> "Reader":
        if isinstance(self.choice, NamedTool):
            return NamedReader(self.choice.function.name)
        if self.choice == "required":
            return ListReader()
        return HermesReader() if parser == HERMES else LlamaReader()


def _parameters(function: Function) -> dict[str, Any]:
    return function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def find_parser(template: Any) -> str | None:
    """How a model calls, by its chat template."""
    text = template if isinstance(template, str) else json.dumps(template)
    if OPEN in text:
        return HERMES
    return LLAMA3 if "tools" in text and "parameters" in text else None


class Reader(ABC):
    """Takes the text of one choice as it comes; gives content and calls, both as they go into a message's delta."""

    forced = False  # whether the client asked for just this call
    num_calls = 0

    def __init__(self) -> None:
        self._rest = ""  # that may be part of a call

    @abstractmethod
    def read(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Of the next piece of text, or the last one."""

    def _call(self, name: str, arguments: str) -> dict[str, Any]:
        head = {"index": self.num_calls, "id": f"call_{uuid4().hex[:24]}", "type": "function"}
        self.num_calls += 1
        return head | {"function": {"name": name, "arguments": arguments}}

    def _call_of(self, value: Any) -> dict[str, Any] | None:
        """Of a JSON object with a name, and arguments under one of the names in use."""
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return self._call(value["name"], text)


class NamedReader(Reader):
    """All text is the arguments of one function."""

    forced = True

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def read(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        if self.num_calls == 0:
            return "", [self._call(self._name, text)]
        return "", [{"index": 0, "function": {"arguments": text}}] if text else []


class ListReader(Reader):
    """A JSON list of calls, each given when it is whole."""

    def read(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        self._rest, calls = self._rest + text, []
        while True:
            rest = self._rest.lstrip(" \n\t[,")
            value, end = _decoded(rest)
            call = self._call_of(value)
            if call is None:
                return "", calls
            calls.append(call)
            self._rest = rest[end:]


class HermesReader(Reader):
    """Text, and calls between tags. A call that is not JSON is text."""

    def read(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        self._rest += text
        content, calls = "", []
        while OPEN in self._rest:
            before, _, rest = self._rest.partition(OPEN)
            body, close, after = rest.partition(CLOSE)
            if not (close or last):
                content, self._rest = content + before, OPEN + rest
                return self._stripped(content), calls
            call = self._call_of(_decoded(body.strip())[0])
            content += before if call else before + OPEN + body + close
            calls += [call] if call else []
            self._rest = after
        held = 0 if last else _held(self._rest, OPEN)
        content, self._rest = content + self._rest[: len(self._rest) - held], self._rest[len(self._rest) - held :]
        return self._stripped(content), calls

    def _stripped(self, content: str) -> str:
        """What stands between calls is mostly white space."""
        return "" if self.num_calls and not content.strip() else content


class LlamaReader(Reader):
    """Either text, or calls: JSON objects with ";" between them, behind a tag or not."""

    def __init__(self) -> None:
        super().__init__()
        self._is_text = False

    def read(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        self._rest += text
        begin = self._rest.lstrip()
        may_call = not begin or begin[0] == "{" or begin.startswith(PYTHON_TAG[: len(begin)])
        if self._is_text or not (may_call or begin.startswith(PYTHON_TAG)):
            self._is_text, (content, self._rest) = True, (self._rest, "")
            return content, []
        if not last:
            return "", []
        calls, rest = [], begin.removeprefix(PYTHON_TAG).strip()
        while rest:
            value, end = _decoded(rest)
            call = self._call_of(value)
            if call is None:
                break
            calls.append(call)
            rest = rest[end:].lstrip("; \n\t")
        return ("", calls) if calls else (self._rest, [])


def _decoded(text: str) -> tuple[Any, int]:
    """The JSON value that a text begins with, and where it ends; None if it is none, or not whole."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None, 0


def _held(text: str, tag: str) -> int:
    """How much of a text's end may be the beginning of a tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


MakeReader = Callable[[], Reader]
