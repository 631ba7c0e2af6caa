"""Structured output: whatever a model would say, what comes out fits; and no grammar hurts the engine."""

import json
import re
import time
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest
from helpers import load_tiny, make_engine
from random_grammars import random_regex, random_schema
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pagedjax import structured, tokenizer
from pagedjax.engine import Engine
from pagedjax.request import Request
from pagedjax.sampling_params import SamplingParams, StructuredOutputsParams
from pagedjax.structured import Constraint, Grammars, token_masks

VOCAB = 128  # of the tiny models: characters, for these tests
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@cache
def characters() -> tokenizer.Tokenizer:
    """A tokenizer whose token ids are ASCII codes, except for the end of a sequence."""
    (eos,) = load_tiny("gqa")[0].config.eos_token_ids
    codes = {"Ġ" if i == 32 else "Ċ" if i == 10 else "ĉ" if i == 9 else chr(i): i for i in (9, 10, *range(32, 127))}
    taken = set(codes.values()) | {eos}
    vocab = {name: i for name, i in codes.items() if i != eos} | {f"<{i}>": i for i in range(VOCAB) if i not in taken}
    backend = Tokenizer(models.BPE(vocab | {"<eos>": eos}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in vocab if re.fullmatch(r"<\d+>", name)])
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer.Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))


@cache
def grammars() -> Grammars:
    return Grammars(characters(), VOCAB, load_tiny("gqa")[0].config.eos_token_ids)


def add(engine: Engine, name: str, wanted: dict[str, Any] | None, **params: Any) -> list[Request]:
    constraint = grammars().constraint(StructuredOutputsParams(**wanted)) if wanted else None
    defaults = {"temperature": 1.0, "seed": 1, "max_tokens": 60}
    return engine.add_request(name, [1, 5, 9], SamplingParams(**defaults | params), constraint=constraint)


def finish(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()


def text_of(request: Request) -> str:
    return characters().decode(request.output_token_ids, skip_special_tokens=True)


def is_met(wanted: dict[str, Any], text: str) -> bool:
    if "json" in wanted:
        jsonschema.validate(json.loads(text), wanted["json"])
        return True
    return re.fullmatch(wanted["regex"], text, re.DOTALL) is not None


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({"regex": r"[a-f]{3}-\d+"}, lambda text: re.fullmatch(r"[a-f]{3}-\d+", text)),
        ({"choice": ["yes", "no", 'a "quoted" one']}, lambda text: text in ("yes", "no", 'a "quoted" one')),
        ({"json": PERSON}, lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
        ({"json": json.dumps(PERSON)}, lambda text: set(json.loads(text)) == {"name", "age"}),
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
        ({"grammar": 'start: "<" WORD ">"\nWORD: /[xyz]{1,4}/'}, lambda text: re.fullmatch("<[xyz]{1,4}>", text)),
        ({"grammar": 'root ::= "[" [0-9] "]"'}, lambda text: re.fullmatch(r"\[\d\]", text)),
    ],
)
def test_output_fits_what_was_asked_for(wanted: dict[str, Any], fits):
    engine = make_engine(*load_tiny("gqa"))
    requests = [add(engine, str(i), wanted, seed=i)[0] for i in range(12)]
    requests += add(engine, "greedy", wanted, temperature=0.0)
    finish(engine)
    whole = [text_of(r) for r in requests if r.finish_reason == "stop"]
    assert len(whole) > 3 and all(fits(text) for text in whole), whole
    assert all(r.finish_reason in ("stop", "length") for r in requests)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(config, marks=pytest.mark.slow) for config in ({"lookahead": 0}, {"max_num_seqs": 3})),
        {"lookahead": 3},
        {"num_pages": 26, "max_num_batched_tokens": 8},
    ],
    ids=str,
)
def test_neither_crowd_nor_lookahead_nor_preemption_changes_an_output(config):
    """Beside requests without a constraint, whose tokens do not change either."""
    wanted = [{"json": PERSON}, None, {"regex": "(ab|c){2,40}"}, None]
    alone = []
    for i, structure in enumerate(wanted):
        engine = make_engine(*load_tiny("gqa"))
        alone += add(engine, str(i), structure, n=2, seed=7 * i)
        finish(engine)
    engine = make_engine(*load_tiny("gqa"), **config)
    together = [r for i, structure in enumerate(wanted) for r in add(engine, str(i), structure, n=2, seed=7 * i)]
    finish(engine)
    assert [r.output_token_ids for r in together] == [r.output_token_ids for r in alone]
    assert [r.finish_reason for r in together] == [r.finish_reason for r in alone]
    assert (engine.scheduler.stats.num_preemptions > 0) == ("num_pages" in config)


def test_an_output_ends_where_nothing_can_follow_without_a_token_for_the_end():
    engine = make_engine(*load_tiny("gqa"))
    (done,) = add(engine, "0", {"choice": ["stop"]}, ignore_eos=True)
    (cut,) = add(engine, "1", {"choice": ["stop"]}, max_tokens=3)
    (exact,) = add(engine, "2", {"choice": ["stop"]}, max_tokens=4)
    finish(engine)
    assert text_of(done) == text_of(exact) == "stop" and len(done.output_token_ids) == 4
    assert (done.finish_reason, cut.finish_reason, exact.finish_reason) == ("stop", "length", "stop")


@pytest.mark.parametrize(
    "against",
    [{"min_tokens": 10}, {"allowed_token_ids": [ord("z")]}, {"logit_bias": {ord("a"): -100.0}}, {"top_k": 1}],
    ids=str,
)
def test_no_other_field_leads_out_of_the_grammar(against):
    engine = make_engine(*load_tiny("gqa"))
    (request,) = add(engine, "0", {"regex": "a{3}b"}, **against)
    finish(engine)
    assert text_of(request) == "aaab" and request.finish_reason == "stop"


def test_log_probabilities_are_the_models_own():
    engine = make_engine(*load_tiny("gqa"))
    (free,) = add(engine, "0", None, max_tokens=1, temperature=0.0, logprobs=20)
    (held,) = add(engine, "1", {"choice": ["q"]}, temperature=0.0, logprobs=20)
    finish(engine)
    top = next(iter(free.logprobs[0]))
    assert held.logprobs[0][top].logprob == pytest.approx(free.logprobs[0][top].logprob, abs=1e-5)
    assert ord("q") in held.logprobs[0]


def test_masks_are_full_for_rows_without_a_constraint():
    constraint = grammars().constraint(StructuredOutputsParams(choice=["ab"]))
    masks = token_masks([None, constraint], 3, VOCAB)
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little").reshape(3, VOCAB)
    assert bits[0].all() and bits[2].all() and np.flatnonzero(bits[1]).tolist() == [ord("a")]
    assert constraint.copy().accept(ord("a")) and not constraint.copy().accept(ord("b"))


@pytest.mark.parametrize(
    "wanted",
    [
        {"regex": "(a"},
        {"regex": r"(?=look)ahead"},
        {"json": {"type": "nothing"}},
        {"json": {"$ref": "#"}},
        {"json": {"type": "array", "uniqueItems": True}},
        {"json": "not JSON"},
        {"json": "[1]"},
        {"grammar": "start: undefined"},
        {"grammar": "start: start start"},
        {"regex": "a" * 200_000},
    ],
    ids=lambda wanted: str(wanted)[:40],
)
def test_what_is_no_grammar_is_refused_soon(wanted):
    """As are those that would take long, and those that nothing fits."""
    start = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        grammars().constraint(StructuredOutputsParams(**wanted))
    assert time.perf_counter() - start < 20 and len(str(caught.value)) < 600


def test_deep_and_large_grammars_are_refused_or_served():
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError):
        grammars().constraint(StructuredOutputsParams(json=schema))
    wide = {"type": "object", "properties": {f"field {i}": {"type": "integer"} for i in range(1000)}}
    cases: list[dict[str, Any]] = [{"json": wide}, {"regex": "(a|aa|aaa)*" * 3000}]
    for wanted in [*cases, {"regex": "((a{1,1000}){1,1000}){1,1000}"}]:
        start = time.perf_counter()
        constraint = grammars().constraint(StructuredOutputsParams(**wanted))
        for _ in range(20):
            token_masks([constraint], 1, VOCAB)
            constraint.accept(ord("a"))
        assert time.perf_counter() - start < 20


def test_few_grammars_are_kept():
    own = Grammars(characters(), VOCAB, (2,))
    for i in range(structured.MAX_GRAMMARS + 20):
        own.constraint(StructuredOutputsParams(regex=f"a{{{i}}}b"))
    assert len(own._compiled) == structured.MAX_GRAMMARS


def test_a_grammar_that_fails_on_the_way_ends_its_request_alone():
    class Failing(Constraint):
        def accept(self, token_id: int) -> bool:
            return False

        @property
        def error(self) -> str:
            return "beyond its limits"

        def copy(self) -> "Failing":
            return Failing(self.matcher.deep_copy(), self.executor)

    engine = make_engine(*load_tiny("gqa"))
    sound = grammars().constraint(StructuredOutputsParams(choice=["fine"]))
    params = SamplingParams(max_tokens=9)
    (bad,) = engine.add_request("0", [1], params, constraint=Failing(sound.matcher, sound.executor))
    (good,) = engine.add_request("1", [1], params, constraint=sound)
    finish(engine)
    assert (bad.finish_reason, bad.stop_reason) == ("abort", "beyond its limits")
    assert text_of(good) == "fine"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "regex"])
def test_random_schemas_and_expressions_are_met(kind: str):
    """A hundred of each; a model of random weights says anything that it may."""
    rng = np.random.default_rng(0)
    make = random_schema if kind == "json" else random_regex
    engine = make_engine(*load_tiny("gqa"), max_num_seqs=32, max_model_len=400, num_pages=4000)
    cases = [({kind: make(rng)}, i) for i in range(100)]
    requests = [add(engine, str(i), wanted, seed=i, max_tokens=380)[0] for wanted, i in cases]
    finish(engine)
    whole = [(wanted, text_of(r)) for (wanted, _), r in zip(cases, requests, strict=True) if r.finish_reason == "stop"]
    assert all(is_met(wanted, text) for wanted, text in whole)
    assert len(whole) > 90 and {r.finish_reason for r in requests} <= {"stop", "length"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"regex": "a", "choice": ["a"]},
        {"choice": []},
        {"choice": "ab"},
        {"regex": ""},
        {"json": 3},
        {"json_object": False},
    ],
    ids=str,
)
def test_exactly_one_structure_is_named(fields):
    with pytest.raises(ValueError, match="accepted"):
        StructuredOutputsParams(**fields)
