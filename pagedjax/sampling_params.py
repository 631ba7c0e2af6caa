"""SamplingParams: how one request is sampled, checked where it enters. No jax here."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

MAX_N = 128
STRUCTURES = "json", "regex", "choice", "grammar", "json_object"
MAX_SEED = 2**63
MAX_INT = 2**31 - 1  # what a row of the device holds
GENERATION_DEFAULTS = "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens"
MIN_FLOAT, MAX_FLOAT = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # float32: smaller is 0 there, larger is infinite


def _check(ok: bool, name: str, value: Any, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{name}={reprlib.repr(value)}; accepted: {accepted}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT


def _is_list(value: Any) -> bool:
    """Something that can be read twice, and is not text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must be, exactly one of: `json`, a schema as a dict or text; `regex`, in Rust's syntax, for the
    whole of it; `choice`, one of these strings; `grammar`, in Lark's or GBNF's form; `json_object`, any JSON object.
    ValueError unless it is one."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = self.given
        _check(len(given) == 1, "structured_outputs", given, f"exactly one of {', '.join(STRUCTURES)}")
        for name, kinds in (("json", str | dict), ("regex", str), ("grammar", str)):
            value = getattr(self, name)
            _check(value is None or (isinstance(value, kinds) and value != ""), name, value, "a description")
        ok = self.choice is None or (_is_list(self.choice) and all(isinstance(s, str) and s for s in self.choice))
        _check(ok and self.choice != [], "choice", self.choice, "a list of non-empty strings")
        _check(self.json_object in (None, True), "json_object", self.json_object, "True or None")

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "StructuredOutputsParams":
        """From JSON-like values; ValueError on a field that does not exist."""
        unknown = sorted(map(str, set(values) - set(STRUCTURES)))
        _check(not unknown, "structured_outputs", unknown, f"exactly one of {', '.join(STRUCTURES)}")
        return StructuredOutputsParams(**values)

    @property
    def given(self) -> list[str]:
        return [name for name in STRUCTURES if getattr(self, name) is not None]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one request; names and rules are vLLM's. ValueError on a bad value, naming the field.

    temperature: 0 is greedy. top_k: 0 or -1 is off. Penalties: presence and frequency over output tokens, repetition
    over prompt and output (arXiv 1909.05858). seed: the same request gives the same tokens, whatever runs beside it.
    stop: strings that end the text, cut from it unless include_stop_str_in_output. max_tokens: None is up to the
    context limit. min_tokens: no end-of-sequence or stop id before. logprobs, prompt_logprobs: how many alternatives;
    -1 is the whole vocabulary. bad_words: never produced. allowed_token_ids: nothing else is produced.
    structured_outputs: what the text must be; it ends the output where nothing can follow, and no other field moves it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", self.n, f"an integer in 1..{MAX_N}")
        for name, low, high in (
            ("temperature", 0.0, 2.0),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            _check(_is_number(value) and low <= value <= high, name, value, f"a finite number in [{low}, {high}]")
        _check(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _check(
            _is_int(self.top_k) and self.top_k >= -1,
            "top_k",
            self.top_k,
            "an integer >= 1, or 0 or -1 for off",
        )
        ok = _is_number(self.repetition_penalty) and self.repetition_penalty >= MIN_FLOAT
        _check(ok, "repetition_penalty", self.repetition_penalty, "a finite number > 0, in float32")
        ok = self.seed is None or (_is_int(self.seed) and -MAX_SEED <= self.seed < MAX_SEED)
        _check(ok, "seed", self.seed, "None or a 64-bit integer")
        _check(
            self.n == 1 or not self.greedy,
            "n",
            self.n,
            "1 when temperature is 0: greedy samples are all the same",
        )
        self._check_lengths()
        self._check_lists()
        structured = self.structured_outputs
        ok = isinstance(structured, StructuredOutputsParams | None)
        _check(ok, "structured_outputs", structured, "StructuredOutputsParams or None")
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        value = self.spaces_between_special_tokens
        _check(isinstance(value, bool), "spaces_between_special_tokens", value, "True or False")

    def _check_lengths(self) -> None:
        ok = self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1)
        _check(ok, "max_tokens", self.max_tokens, "an integer >= 1, or None for up to the context limit")
        ok = _is_int(self.min_tokens) and 0 <= self.min_tokens <= MAX_INT
        _check(ok, "min_tokens", self.min_tokens, f"an integer in 0..{MAX_INT}")
        ok = self.max_tokens is None or self.min_tokens <= self.max_tokens
        _check(ok, "min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(value is None or (_is_int(value) and value >= -1), name, value, "None or an integer >= -1")

    def _check_lists(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            value = [value] if isinstance(value, str) and name == "stop" else value
            ok = value is None or (_is_list(value) and all(isinstance(s, str) and s for s in value))
            _check(ok, name, getattr(self, name), "a list of non-empty strings")
        for name in ("stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            ok = value is None or (_is_list(value) and all(_is_int(i) and i >= 0 for i in value))
            _check(ok, name, value, "a list of token ids")
        _check(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            self.allowed_token_ids,
            "None or at least one id",
        )
        bias = {} if self.logit_bias is None else self.logit_bias
        ok = isinstance(bias, dict) and all(_is_int(i) and i >= 0 and _is_number(b) for i, b in bias.items())
        _check(ok, "logit_bias", self.logit_bias, "a dict from token ids to finite numbers (clamped to +-100)")
        _check(self.detokenize or not self.stop, "stop", self.stop, "None when detokenize is False")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalized(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "SamplingParams":
        """From JSON-like values; ValueError on a field that does not exist."""
        known = {f.name for f in fields(SamplingParams)}
        for name in values:
            _check(name in known, name, values[name], f"fields are {', '.join(sorted(known))}")
        structured = values.get("structured_outputs")
        if isinstance(structured, dict):
            values = values | {"structured_outputs": StructuredOutputsParams.from_dict(structured)}
        return SamplingParams(**values)

    @staticmethod
    def from_hf(generation_config: Mapping[str, Any]) -> "SamplingParams":
        """A model's own defaults."""
        named = {**generation_config, "max_tokens": generation_config.get("max_new_tokens")}
        return SamplingParams(**{k: named[k] for k in GENERATION_DEFAULTS if named.get(k) is not None})
