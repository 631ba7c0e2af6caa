"""What does structured output cost a token?

Questions: microseconds of the host to compile a structure, and to fill the mask of a token and take it in, for one row
and for many at a time; and what the engine's rate becomes when all rows are constrained. Varied: structure, rows,
shape. Held: random walks through each structure over a byte-level tokenizer of the shape's vocabulary, made up; in the
engine random weights, 64 tokens of prompt, `--output` tokens, greedy, all at once. Expected: 50 to 100 us a mask, and
masks of many rows in threads; so where a step takes longer than its masks, the rate loses what the plain path has:
several steps in a dispatch, sampling within the forward pass, and the transfer of masks, a bit a token.

    python -m experiments.structured [--shape llama3.2-1b] [--rows 1 64 256] [--output 128] [--small]

Rows go to `results/structured.jsonl`, one a structure and number of rows, and two a number of rows of the engine.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pagedjax import LLM, SamplingParams, StructuredOutputsParams
from pagedjax.bench import environment, package_data
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.structured import Constraint, Grammars, token_masks

from .common import Parser, record, small_shape
from .serving import make_tokenizer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "kept"]}},
        "home": {"type": "object", "properties": {"street": {"type": "string"}, "number": {"type": "integer"}}},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 1000}  # never over before the output is
STRUCTURES: dict[str, dict[str, Any]] = {
    "schema": {"json": ENDLESS},
    "any object": {"json_object": True},
    "regex": {"regex": r"(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z? ){1000,}"},
    "choice": {"choice": [f"class number {i}" for i in range(1000)]},
}


def walk(grammars: Grammars, wanted: dict[str, Any], rows: int, steps: int, vocab_size: int) -> dict[str, float]:
    """Random walks of so many rows, begun again where they end; medians over steps."""
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    first = grammars.constraint(StructuredOutputsParams(**wanted))
    compile_ms = (time.perf_counter() - start) * 1e3
    constraints: list[Constraint] = [first.copy() for _ in range(rows)]
    masking, accepting = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        masks = token_masks(constraints, rows, vocab_size)
        filled = time.perf_counter()
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :vocab_size]
        tokens = [int(rng.choice(np.flatnonzero(row))) for row in bits]
        chosen = time.perf_counter()
        accepted = [one.accept(token) for one, token in zip(constraints, tokens, strict=True)]
        accepting.append(time.perf_counter() - chosen)
        masking.append(filled - begin)
        constraints = [c if ok and not c.is_done else first.copy() for c, ok in zip(constraints, accepted, strict=True)]
    return {
        "compile_ms": compile_ms,
        "mask_us": statistics.median(masking) / rows * 1e6,
        "worst_mask_us": max(masking) / rows * 1e6,
        "accept_us": statistics.median(accepting) / rows * 1e6,
    }


def rates(llm: LLM, rows: int, output: int, repeat: int) -> Iterator[dict[str, Any]]:
    """Output tokens per second without a structure and with one, the best of some runs after the first."""
    rng = np.random.default_rng(1)
    vocab_size = llm.engine.runner.model.config.vocab_size
    prompts: Any = [rng.integers(0, vocab_size, 64).tolist() for _ in range(rows)]
    best: dict[str, float] = {}
    for structure in (None, StructuredOutputsParams(json=ENDLESS)):
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, structured_outputs=structure)
        for trial in range(repeat + 1):
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            rate = sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - start)
            assert all(o.outputs[0].finish_reason == "length" for o in outputs), "an output left its grammar"
            name = "schema" if structure else "none"
            best[name] = max(best.get(name, 0.0), rate if trial else 0.0)
    for name, rate in best.items():
        yield {"engine": name, "rows": rows, "tokens_per_s": rate, "ratio": rate / best["none"]}


def main() -> None:
    parser = Parser("structured", __doc__, small="a small model and few rows")
    parser.add_argument("--shape", default="llama3.2-1b", help="a named shape")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--steps", type=int, default=200, help="of a walk")
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    model = str(package_data("shapes", args.shape))
    if args.small:
        args.rows, args.steps, args.output, args.repeat = [1, 8], 20, 24, 1
        model = small_shape(args.shape)
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    settings = {"max_model_len": 64 + args.output, "max_num_seqs": max(args.rows), "max_num_batched_tokens": 2048}
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = json.loads(Path(model).read_text())["vocab_size"]
        make_tokenizer(folder, vocab_size)
        llm = LLM(model=model, load_format="dummy", tokenizer=folder, **settings)
    llm.engine.warm_up(progress=False)
    rows: list[dict[str, Any]] = []
    for count in args.rows:
        for name, wanted in STRUCTURES.items():
            found = walk(llm.grammars, wanted, count, args.steps, vocab_size)
            rows.append({"structure": name, "rows": count, **found})
            show(rows[-1])
        for row in rates(llm, count, args.output, args.repeat):
            rows.append(row)
            show(row)
    held = {"shape": args.shape, "vocab_size": vocab_size, "output": args.output} | environment()
    for row in rows:
        record(args.results, row | held)


def show(row: dict[str, Any]) -> None:
    print(" ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
