"""SamplingParams: each rule, at its edge, from both sides; errors name the field."""

import math
import re
from typing import Any

import pytest

from pagedjax.sampling_params import MAX_FLOAT, MAX_INT, MAX_N, MIN_FLOAT, SamplingParams, StructuredOutputsParams

NOT_FINITE = (math.nan, math.inf, -math.inf, 10**400, 1e39)
NOT_NUMBERS = (*NOT_FINITE, True, "1", [1.0], None, 1j)
NOT_INTEGERS = (*NOT_FINITE[:3], True, 1.0, "1", [1])
NOT_BOOLEANS = (0, 1, "true", None, [True])
NOT_STRING_LISTS = (5, 1.5, True, b"ab", {"a": 1}, {"a"}, (s for s in ["a"]), [1], [b"a"], [None], ["a", ""], [["a"]])
NOT_ID_LISTS = (5, "12", b"12", {1}, {1: 2}, (i for i in [1]), [1.0], ["1"], [True], [None], [-1], [[1]], [math.nan])
NOT_BIASES = (5, "x", [1], [(1, 2.0)], {"1": 1.0}, {1.0: 1.0}, {True: 1.0}, {-1: 1.0}, {1: "x"}, {1: None}, {1: True})

# field -> (values that pass, values that do not)
RULES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "n": ((1, 2, MAX_N), (0, -1, MAX_N + 1, 10**9, None, *NOT_INTEGERS)),
    "temperature": ((0, 0.0, 1e-6, 1, 2.0), (-0.1, 2.1, -1, *NOT_NUMBERS)),
    "top_p": ((1, 1.0, 1e-9, 0.5), (0, 0.0, -0.5, 1.01, *NOT_NUMBERS)),
    "top_k": ((-1, 0, 1, 10**9), (-2, None, *NOT_INTEGERS)),
    "min_p": ((0, 0.0, 1, 0.5), (-0.01, 1.01, *NOT_NUMBERS)),
    "presence_penalty": ((-2, 0, 2.0), (-2.01, 2.01, *NOT_NUMBERS)),
    "frequency_penalty": ((-2, 0, 2.0), (-2.01, 2.01, *NOT_NUMBERS)),
    "repetition_penalty": ((MIN_FLOAT, 0.5, 1, MAX_FLOAT), (0, -1, 1e-50, *NOT_NUMBERS)),
    "seed": ((None, 0, -1, -(2**63), 2**63 - 1), (2**63, -(2**63) - 1, *NOT_INTEGERS)),
    "stop": ((None, [], "a", "\n", ["a", "bc"], ("a",)), ("", *NOT_STRING_LISTS)),
    "bad_words": ((None, [], ["a", "bc"], ("a",)), ("a", "", *NOT_STRING_LISTS)),
    "stop_token_ids": ((None, [], [0], (1, 2), range(3)), NOT_ID_LISTS),
    "allowed_token_ids": ((None, [0], (1, 2), range(3)), ([], *NOT_ID_LISTS)),
    "logit_bias": (
        (None, {}, {0: 1}, {5: -250.0, 6: 100}),
        (*NOT_BIASES, *({1: value} for value in NOT_FINITE)),
    ),
    "structured_outputs": ((None, StructuredOutputsParams(regex="a")), ("a", {}, {"regex": "a"}, 1, True)),
    "max_tokens": ((None, 1, 10**9), (0, -1, *NOT_INTEGERS)),
    "min_tokens": ((0, 16), (-1, 17, None, MAX_INT + 1, *NOT_INTEGERS)),
    "logprobs": ((None, -1, 0, 20), (-2, *NOT_INTEGERS)),
    "prompt_logprobs": ((None, -1, 0, 20), (-2, *NOT_INTEGERS)),
    "include_stop_str_in_output": ((True, False), NOT_BOOLEANS),
    "ignore_eos": ((True, False), NOT_BOOLEANS),
    "detokenize": ((True, False), NOT_BOOLEANS),
    "skip_special_tokens": ((True, False), NOT_BOOLEANS),
    "spaces_between_special_tokens": ((True, False), NOT_BOOLEANS),
}

GOOD = [(name, value) for name, (good, _) in RULES.items() for value in good]
BAD = [(name, value) for name, (_, bad) in RULES.items() for value in bad]


def make(name: str, value: Any) -> SamplingParams:
    return SamplingParams(**{name: value})


def describe(value: Any) -> str:
    return repr(value)[:30] if isinstance(value, str | float | int | list | dict | None) else type(value).__name__


def test_every_field_has_a_rule_here():
    assert set(RULES) == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), GOOD, ids=describe)
def test_values_up_to_the_edge_are_accepted_and_kept(name: str, value: Any):
    assert getattr(make(name, value), name) is value


@pytest.mark.parametrize(("name", "value"), BAD, ids=describe)
def test_values_past_the_edge_are_refused_by_the_field_s_name(name: str, value: Any):
    with pytest.raises(ValueError, match=rf"^{name}=.*; accepted: "):
        make(name, value)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 2.5), ("n", 0), ("stop", [""]), ("logit_bias", {1: "x"}), ("top_k", None)]
)
def test_errors_name_the_value(name: str, value: Any):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}; accepted: ")):
        make(name, value)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "bad_words", "allowed_token_ids"])
def test_errors_do_not_echo_a_huge_value(name: str):
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        make(name, [*["x" * 1000] * 1000, None])
    assert len(str(error.value)) < 400


def test_the_defaults_are_those_of_vllm():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty, p.seed) == (0.0, 0.0, 1.0, None)
    assert (p.max_tokens, p.min_tokens, p.ignore_eos, p.stop, p.stop_token_ids) == (16, 0, False, None, None)
    assert (p.logprobs, p.prompt_logprobs, p.detokenize, p.skip_special_tokens) == (None, None, True, True)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9.9e-6, True), (1e-5, False), (1.0, False)])
def test_a_temperature_below_one_hundred_thousandth_is_greedy(temperature: float, greedy: bool):
    assert SamplingParams(temperature=temperature).greedy == greedy


def test_several_greedy_samples_are_refused():
    with pytest.raises(ValueError, match=r"^n=2; accepted: 1 when temperature is 0"):
        SamplingParams(n=2, temperature=0)
    SamplingParams(n=2, temperature=0.1)


@pytest.mark.parametrize(("min_tokens", "max_tokens", "ok"), [(5, 5, True), (5, None, True), (6, 5, False)])
def test_min_tokens_is_at_most_max_tokens(min_tokens: int, max_tokens: int | None, ok: bool):
    if ok:
        SamplingParams(min_tokens=min_tokens, max_tokens=max_tokens)
    else:
        with pytest.raises(ValueError, match=f"^min_tokens={min_tokens}; accepted: at most max_tokens={max_tokens}"):
            SamplingParams(min_tokens=min_tokens, max_tokens=max_tokens)


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match=r"^stop='a'; accepted: None when detokenize is False"):
        SamplingParams(stop="a", detokenize=False)
    SamplingParams(stop=[], detokenize=False)


@pytest.mark.parametrize(("stop", "strings"), [(None, ()), ([], ()), ("ab", ("ab",)), (["a", "b"], ("a", "b"))])
def test_one_stop_string_is_a_list_of_one(stop: Any, strings: tuple[str, ...]):
    assert SamplingParams(stop=stop).stop_strings == strings


@pytest.mark.parametrize(
    ("values", "truncated"),
    [({}, False), ({"top_k": -1}, False), ({"top_k": 1}, True), ({"top_p": 0.9}, True), ({"min_p": 0.1}, True)],
)
def test_what_cuts_the_distribution_says_so(values: dict[str, Any], truncated: bool):
    assert SamplingParams(**values).truncated == truncated


@pytest.mark.parametrize(
    ("values", "penalized"),
    [
        ({}, False),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 0.9}, True),
    ],
)
def test_a_penalty_of_either_sign_says_so(values: dict[str, Any], penalized: bool):
    assert SamplingParams(**values).penalized == penalized


def test_from_dict_takes_the_fields_there_are():
    values = {"temperature": 0.5, "stop": ["x"], "max_tokens": 3}
    assert SamplingParams.from_dict(values) == SamplingParams(temperature=0.5, stop=["x"], max_tokens=3)


@pytest.mark.parametrize("name", ["best_of", "Temperature", "guided_json", "greedy", ""])
def test_from_dict_refuses_a_field_that_does_not_exist(name: str):
    with pytest.raises(ValueError, match=rf"^{name}=1; accepted: .*temperature"):
        SamplingParams.from_dict({"max_tokens": 3, name: 1})


def test_parameters_cannot_change_after_they_were_checked():
    with pytest.raises(AttributeError):
        SamplingParams().n = 0  # pyright: ignore[reportAttributeAccessIssue]
