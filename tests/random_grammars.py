"""Random JSON schemas and regular expressions, of what is common in both."""

from typing import Any

import numpy as np

LETTERS = "abcdefxyz"
MAX_DEPTH = 3


def random_schema(rng: np.random.Generator, depth: int = 0) -> dict[str, Any]:
    leaves = [_string, _integer, _number, _enum, _const, lambda rng: {"type": "boolean"}, lambda rng: {"type": "null"}]
    nodes = [_object, _array, _any_of]
    if depth < MAX_DEPTH and (depth == 0 or rng.random() < 0.4):
        return nodes[rng.integers(len(nodes))](rng, depth)
    return leaves[rng.integers(len(leaves))](rng)


def _word(rng: np.random.Generator, least: int = 1) -> str:
    return "".join(rng.choice(list(LETTERS), rng.integers(least, 6)))


def _string(rng: np.random.Generator) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"type": "string", "pattern": f"^{random_regex(rng, 2)}$"}
    low = int(rng.integers(0, 3))
    return {"type": "string", "minLength": low, "maxLength": low + int(rng.integers(0, 6))}


def _integer(rng: np.random.Generator) -> dict[str, Any]:
    low = int(rng.integers(-1000, 1000))
    return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 500))}


def _number(rng: np.random.Generator) -> dict[str, Any]:
    low = float(np.round(rng.normal(), 2))
    return {"type": "number", "minimum": low, "maximum": low + 10}


def _enum(rng: np.random.Generator) -> dict[str, Any]:
    return {"enum": [_word(rng), int(rng.integers(-9, 9)), None, True, {_word(rng): [1, 2]}][: rng.integers(1, 6)]}


def _const(rng: np.random.Generator) -> dict[str, Any]:
    return {"const": [_word(rng), int(rng.integers(100))]}


def _object(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    properties = {_word(rng): random_schema(rng, depth + 1) for _ in range(rng.integers(1, 4))}
    required = [name for name in properties if rng.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    low = int(rng.integers(0, 2))
    return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + 2}


def _any_of(rng: np.random.Generator, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.integers(2, 4))]}


def random_regex(rng: np.random.Generator, depth: int = 0) -> str:
    """Matches texts of a bounded length."""
    parts = [_atom(rng, depth) + _count(rng) for _ in range(rng.integers(1, 4))]
    return "".join(parts)


def _atom(rng: np.random.Generator, depth: int) -> str:
    kind = rng.integers(4 if depth < MAX_DEPTH else 3)
    if kind == 0:
        return str(rng.choice(list(LETTERS)))
    if kind == 1:
        return str(rng.choice(["[a-d]", "[0-9]", "[^a-y]", "[A-Z_]", r"\.", r"[\-+]"]))
    if kind == 2:
        return f"(?:{_word(rng)}|{_word(rng)})"
    return f"(?:{random_regex(rng, depth + 1)}|{random_regex(rng, depth + 1)})"


def _count(rng: np.random.Generator) -> str:
    low = int(rng.integers(0, 3))
    return str(rng.choice(["", "", "?", f"{{{low},{low + 2}}}"]))
