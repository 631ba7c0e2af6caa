"""What clients may send: OpenAI's completion and chat requests with vLLM's further fields, and the demo API's.

A field that is not offered is refused by name, never ignored. What `SamplingParams` checks is left to it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from pagedjax.sampling_params import SamplingParams, StructuredOutputsParams

from .bodies import Entries
from .tools import MAX_TOOLS, Tool, Toolbox, ToolCall, ToolChoice

MAX_STOP = 4  # strings, as at OpenAI
MAX_LIST = 1024  # entries of other lists
MAX_CHOICES = 2048  # of one request: its prompts times n
MAX_TOP_LOGPROBS = 20


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # it always is


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def structured(self) -> StructuredOutputsParams | None:
        """What it asks of the output. ValueError on a schema without that type, or that type without one."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(f"response_format={self.type!r}; accepted: json_schema with a json_schema, others without")
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.json_schema)
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


class Sampled(BaseModel):
    """The fields that completion and chat requests share. Names are OpenAI's, then vLLM's."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Entries[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None  # whom the request is for; of no consequence
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Entries[int] | None = Field(default=None, max_length=MAX_LIST)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    allowed_token_ids: Entries[int] | None = None
    bad_words: Entries[str] | None = Field(default=None, max_length=MAX_LIST)
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None  # StructuredOutputsParams' fields
    cache_salt: str | None = None
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    request_id: str | None = Field(default=None, min_length=1, max_length=128)

    copied: ClassVar[tuple[str, ...]] = (
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "min_tokens",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "allowed_token_ids",
        "bad_words",
    )
    defaulted: ClassVar[tuple[str, ...]] = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

    def sampling(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """As the engine takes it; what is left out is the model's own default. ValueError naming the field."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if stops and len(stops) > MAX_STOP:
            raise ValueError(f"stop has {len(stops)} strings; accepted: at most {MAX_STOP}")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options without stream=true; accepted: both or neither")
        values = {name: getattr(self, name) for name in self.copied}
        for name in self.defaulted:
            value = getattr(self, name)
            values[name] = getattr(defaults, name) if value is None else value
        if values["temperature"] < 1e-5 and self.n > 1:
            raise ValueError(f"n={self.n}; accepted: 1 when temperature is 0: greedy samples are all the same")
        values |= {"n": self.n, "stop": stops or None, "logit_bias": token_bias(self.logit_bias)}
        return SamplingParams(structured_outputs=self.structured(), **values | more)

    def structured(self) -> StructuredOutputsParams | None:
        """What the output must be. ValueError if two fields say so."""
        asked = self.response_format.structured() if self.response_format else None
        if self.structured_outputs is None:
            return asked
        if asked:
            raise ValueError("structured_outputs beside response_format; accepted: one of them")
        return StructuredOutputsParams.from_dict(self.structured_outputs)


def token_bias(bias: Mapping[str, float] | None) -> dict[int, float] | None:
    """JSON's keys are strings."""
    if bias is None:
        return None
    if len(bias) > MAX_LIST:
        raise ValueError(f"logit_bias has {len(bias)} entries; accepted: at most {MAX_LIST}")
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise ValueError("logit_bias has a key that is no token id; accepted: integers") from error


class CompletionRequest(Sampled):
    prompt: str | Entries[int] | Entries[str] | Entries[Entries[int]]
    max_tokens: int | None = 16
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = None
    add_special_tokens: bool = True

    def prompts(self) -> list[str | list[int]]:
        """One or several. ValueError on none, and on one that is empty."""
        single = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        prompts: Any = [self.prompt] if single else list(self.prompt)
        if not prompts or not all(prompts):
            raise ValueError("prompt is empty; expected at least one token")
        if len(prompts) > MAX_LIST:
            raise ValueError(f"prompt has {len(prompts)} entries; accepted: at most {MAX_LIST}")
        if len(prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"n={self.n} of {len(prompts)} prompts; accepted: at most {MAX_CHOICES} choices in all")
        return prompts

    def params(self, defaults: SamplingParams) -> SamplingParams:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of}; accepted: n={self.n}, or nothing")
        max_tokens = self.max_tokens
        if max_tokens == 0 and self.echo:
            max_tokens = 1  # which is computed for the prompt's log-probabilities, and not shown
        prompt_logprobs = self.logprobs if self.echo else None
        return self.sampling(defaults, max_tokens=max_tokens, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Entries[TextPart] | None = None
    name: str | None = None
    tool_calls: Entries[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As chat templates take it: text, without what was not given."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        more: dict[str, Any] = {"name": self.name, "tool_call_id": self.tool_call_id}
        more["tool_calls"] = [call.as_dict() for call in self.tool_calls or ()]
        return {"role": self.role, "content": content} | {name: value for name, value in more.items() if value}


class ChatRequest(Sampled):
    messages: Entries[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    add_generation_prompt: bool = True
    tools: Entries[Tool] | None = Field(default=None, min_length=1, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True

    def toolbox(self) -> Toolbox | None:
        """The tools, unless there are none. ValueError if they cannot be used as is asked."""
        if self.tools is None:
            if self.tool_choice not in (None, "none"):
                raise ValueError("tool_choice without tools; accepted: both or neither")
            return None
        return Toolbox(self.tools, self.tool_choice or "auto", self.parallel_tool_calls)

    def structured(self) -> StructuredOutputsParams | None:
        asked, toolbox = super().structured(), self.toolbox()
        if toolbox is None or toolbox.choice == "none":
            return asked
        if asked:
            raise ValueError("response_format beside tools; accepted: one of them, or tool_choice none")
        return StructuredOutputsParams(json=toolbox.schema()) if toolbox.is_constrained else None

    def params(self, defaults: SamplingParams) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"top_logprobs={self.top_logprobs} without logprobs=true; accepted: both or neither")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        limits = [limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None]
        return self.sampling(defaults, max_tokens=limits[0] if limits else None, logprobs=logprobs)


class GenerateRequest(BaseModel):
    """vLLM's demo API: the other fields are `SamplingParams`'."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(min_length=1)
    stream: bool = False

    def params(self) -> SamplingParams:
        given = dict(self.model_extra or {})
        for name in ("stop", "stop_token_ids", "bad_words"):
            value = given.get(name)
            if isinstance(value, list) and len(value) > MAX_LIST:
                raise ValueError(f"{name} has {len(value)} entries; accepted: at most {MAX_LIST}")
        if isinstance(given.get("logit_bias"), dict):
            given["logit_bias"] = token_bias(given["logit_bias"])
        return SamplingParams.from_dict(given)


class TokenizeRequest(BaseModel):
    """Of a prompt, or of a conversation."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Entries[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: Entries[int]
