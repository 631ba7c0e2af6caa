"""Structured output: which tokens may come next, so that a text fits a JSON schema, a regular expression, one of some
choices or a grammar. No jax here.

llguidance (https://github.com/guidance-ai/llguidance) compiles grammars and computes masks over the vocabulary, within
limits, so that no grammar takes long or grows without end.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .sampling_params import StructuredOutputsParams
from .tokenizer import Tokenizer

MAX_GRAMMARS = 64  # compiled ones that are kept, those used least recently go
MAX_CHARS = 100_000  # of a grammar
MAX_MESSAGE = 300
# JSON in any common style: on one line or indented, without a run of spaces that never ends.
JSON_STYLE = {"whitespace_pattern": r"(\n[ \t]{0,32}| )?"}
LIMITS = {"max_lexer_states": 50_000, "verbose_errors": False}


class Constraint:
    """What one sequence's output must be, and how far it has come."""

    def __init__(self, matcher: Any, executor: Any):
        """Of llguidance's matcher; its executor computes masks in threads."""
        self.matcher, self.executor = matcher, executor

    def copy(self) -> "Constraint":
        return Constraint(self.matcher.deep_copy(), self.executor)

    def accept(self, token_id: int) -> bool:
        """Takes the next token; False if it may not come here, or the grammar has got beyond its limits."""
        return self.matcher.consume_token(token_id)

    @property
    def error(self) -> str:
        """Why it accepts nothing any more; empty if it does."""
        return self.matcher.get_error()[:MAX_MESSAGE] if self.matcher.is_error() else ""

    @property
    def is_done(self) -> bool:
        """Whether nothing but an end can follow."""
        return self.matcher.is_stopped()


class Grammars:
    """Compiles what outputs must be, of a vocabulary of `vocab_size` in which `eos_ids` end a text. Any thread may ask.

    ImportError where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        try:
            import llguidance
        except ImportError as error:
            raise ImportError("structured output needs llguidance: pip install 'pagedjax[serve]'") from error
        self._library, self._limits = llguidance, llguidance.LLParserLimits(**LIMITS)
        text = tokenizer.backend.to_str()
        self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_ids) or None)
        self._executor = llguidance.LLExecutor()
        self._compiled: OrderedDict[str, Constraint] = OrderedDict()
        self._lock = threading.Lock()

    def constraint(self, wanted: StructuredOutputsParams) -> Constraint:
        """At its beginning. ValueError on what is no grammar, or one that is too large."""
        grammar = self._grammar(wanted)
        found = self._compiled.get(grammar) or self._compile(wanted.given[0], grammar)
        with self._lock:
            self._compiled[grammar] = found
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        return found.copy()

    def _compile(self, name: str, grammar: str) -> Constraint:
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        constraint = Constraint(matcher, self._executor)
        if not constraint.error:
            constraint.matcher.compute_bitmask()  # finds grammars that nothing fits
        if constraint.error:
            raise ValueError(f"{name} is no grammar that can be followed: {constraint.error}")
        return constraint

    def _grammar(self, wanted: StructuredOutputsParams) -> str:
        """As llguidance reads it."""
        (name,) = wanted.given
        make, value = self._library.LLMatcher, getattr(wanted, name)
        size = len(value) if isinstance(value, str) else len(json.dumps(value))
        if size > MAX_CHARS:
            raise ValueError(f"{name} has {size} characters; accepted: at most {MAX_CHARS}")
        if name in ("json", "json_object"):
            return make.grammar_from_json_schema(_schema(value), overrides=JSON_STYLE)
        if name == "regex":
            return make.grammar_from_regex(value)
        if name == "choice":
            return make.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in value))
        return self._library.grammar_from("grammar", value)


def _schema(value: Any) -> str:
    """The text of a JSON schema. ValueError on what is none."""
    if value is True:  # any object
        return '{"type": "object"}'
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"json is no JSON schema: {error}") from error
    if not isinstance(schema, dict | bool):
        raise ValueError(f"json is a {type(schema).__name__}; accepted: a schema, which is an object")
    return text


def token_masks(constraints: Sequence[Constraint | None], num_rows: int, vocab_size: int) -> np.ndarray:
    """Tokens that may come next in each row, as bits, int32 [num_rows, ceil(vocab_size / 32)]; without a constraint,
    all."""
    masks = np.full((num_rows, -(-vocab_size // 32)), -1, np.int32)
    matchers = [(one.matcher, i) for i, one in enumerate(constraints) if one]
    executor = next((one.executor for one in constraints if one), None)
    if executor:
        executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], num_rows)
    return masks
