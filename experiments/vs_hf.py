"""How much faster than transformers is the paged engine, in the terms of the tutorial that this project began with?

Question: seconds and output tokens per second of LLaMA-2-7B's shape at temperature 0.1: one prompt and 8 prompts of 128
tokens with 256 more each, and a crowd, the 256 requests of sharegpt-like-256. Varied: batch, and system (for those of
transformers see `hf_generate.py`). Held: exact output lengths, random prompts and weights, bf16 on a GPU, all requests
at once; each system once unmeasured before its trials. Expected on an H200: transformers takes 17 s for one prompt and
for 8, bound by the host, far less with a static cache and compilation, and cannot hold the crowd as one padded batch;
pagedjax takes 1.0 to 1.2 s for either, and all of the crowd.

    python -m experiments.vs_hf --hf-python PATH_TO_PYTHON_WITH_TORCH [--model FOLDER] [--system NAME ...]
        [--batch 1 8 256] [--timeout SECONDS] [--small]

transformers' systems run first, each in a process of its own that has the card to itself; without --hf-python only
pagedjax runs. Rows go to `results/vs_hf.jsonl`, one a trial; where memory or time ran out, a row says that.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from pagedjax import LLM, SamplingParams
from pagedjax.bench import Lengths, load_workload
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine

from .common import Parser, conditions, engine_config, make_engine, provenance, record, shape_path

ROOT = Path(__file__).parent.parent
BATCHES = {1: "single-128-256", 8: "batch8-128-256", 256: "sharegpt-like-256"}
THEIRS = "generate", "flash", "static", "continuous"
GROWING = "generate", "flash"  # whose caches an allocator of fixed segments leaves gaps behind
# Seconds on a T4 as a tutorial on vLLM gives them: LLaMA-2-7B-Chat, max_new_tokens 256, temperature 0.1; of 41 to 43
# the middle.
TUTORIAL = {"one prompt": {"transformers": 16.9, "vLLM": 14.1}, "a small batch": {"transformers": 62, "vLLM": 42}}


SMALL: dict[str, Any] = {"max_num_seqs": 12, "max_num_batched_tokens": 64}


def lengths_of(batch: int, small: bool) -> Lengths:
    """Prompt and output tokens of a batch's requests, few and short ones if small."""
    lengths = load_workload(BATCHES[batch]).lengths
    return [(min(prompt, 24), min(output, 8)) for prompt, output in lengths[:12]] if small else lengths


def transformers_rows(args: argparse.Namespace, system: str, folder: Path) -> Iterator[dict[str, Any]]:
    """What hf_generate prints of a system on all batches; a last row where it fails or its time is over."""
    files = [folder / f"{BATCHES[batch]}.json" for batch in args.batch]
    for batch, file in zip(args.batch, files, strict=True):
        file.write_text(json.dumps({"lengths": lengths_of(batch, args.small)}))
    command = [args.hf_python, "-m", "experiments.hf_generate", "--model", args.path, "--system", system]
    command += ["--repeat", str(args.repeat), "--temperature", str(args.temperature)]
    command += ["--compile-level", str(args.compile_level), *map(str, files)]
    variables = os.environ | {"HF_HUB_OFFLINE": "1"}
    if system in GROWING:
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=variables) as process,
    ):
        timer = threading.Timer(args.timeout, process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith("{"):
                yield json.loads(line)
        in_time = timer.is_alive()
        timer.cancel()
        if process.wait():
            errors.seek(0)
            message = (errors.read().splitlines() or [""])[-1] if in_time else f"{args.timeout:g} s are over"
            yield {"system": system, "outcome": "failed" if in_time else "out of time", "message": message}


def pagedjax_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trials of the engine; a last row where its time is over."""
    deadline = time.monotonic() + args.timeout
    all_lengths = {batch: lengths_of(batch, args.small) for batch in args.batch}
    longest = max(sum(pair) for lengths in all_lengths.values() for pair in lengths)
    settings = (SMALL if args.small else {}) | {"max_model_len": longest}
    if args.model:
        engine = LLM(args.model, skip_tokenizer_init=True, **settings).engine
    else:
        engine = make_engine(args.path, **settings)
    engine.warm_up(progress=False)
    held = {"system": "pagedjax", "model": Path(args.path).name, "dtype": engine.config.dtype}
    held |= {"temperature": args.temperature, "settings": engine_config(engine)}
    for batch, lengths in all_lengths.items():
        pages = run(engine, lengths, args.temperature, seed=0)[1]
        held |= {"workload": BATCHES[batch], "batch": len(lengths), "peak_kv_bytes": pages * engine.page_bytes}
        for trial in range(args.repeat):
            if time.monotonic() > deadline:
                yield held | {"outcome": "out of time", "message": f"{args.timeout:g} s are over"}
                return
            seconds, tokens = run(engine, lengths, args.temperature, trial + 1)[0], sum(new for _, new in lengths)
            found = {"trial": trial, "seed": trial + 1, "outcome": "ok", "seconds": seconds, "output_tokens": tokens}
            peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")  # the pool's free pages included
            yield held | found | {"output_tokens_per_s": tokens / seconds, "peak_bytes": peak}


def run(engine: Engine, lengths: Lengths, temperature: float, seed: int) -> tuple[float, int]:
    """Seconds from the first request's arrival to the last token, and the most pages used at a step's end."""
    rng, vocab_size, pages = random.Random(seed), engine.runner.model.config.vocab_size, 0
    prompts = [[rng.randrange(vocab_size) for _ in range(prompt)] for prompt, _ in lengths]
    start, requests = time.perf_counter(), []
    for i, (prompt, (_, output)) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(temperature=temperature, max_tokens=output, ignore_eos=True, detokenize=False)
        requests += engine.add_request(str(i), prompt, params)
    while engine.has_unfinished:
        engine.step()
        pages = max(pages, engine.pool.num_used)
    seconds = time.perf_counter() - start
    assert [len(request.output_token_ids) for request in requests] == [output for _, output in lengths]
    return seconds, pages


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    words = f"{row.get('workload', ''):18} {row['system']:10} {row.get('batch', ''):>5}"
    if row["outcome"] != "ok":
        print(f"{words}  {row['outcome']}: {row['message']}", flush=True)
        return
    peak = f"{row['peak_bytes'] / 2**30:9.1f}" if row["peak_bytes"] else ""
    print(f"{words} {row['seconds']:8.2f} {row['output_tokens_per_s']:9.1f} {peak}".rstrip(), flush=True)


def show_ratios(rows: list[dict[str, Any]]) -> None:
    """How many times pagedjax's best rate is another system's."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["outcome"] == "ok":
            key = row["workload"], row["system"]
            best[key] = max(best.get(key, 0.0), row["output_tokens_per_s"])
    for (workload, system), rate in best.items():
        if system != "pagedjax" and (workload, "pagedjax") in best:
            print(f"{workload}: pagedjax is {best[workload, 'pagedjax'] / rate:.1f} times as fast as {system}")


def main() -> None:
    parser = Parser("vs_hf", __doc__, small="a small model and short requests")
    parser.add_argument("--hf-python", help="of an environment that has torch and transformers")
    parser.add_argument("--model", help="a folder with real weights, which both sides load")
    parser.add_argument("--shape", default="llama2-7b", help="for random weights: a named shape, or a config.json")
    parser.add_argument("--system", nargs="+", default=[*THEIRS, "pagedjax"], choices=[*THEIRS, "pagedjax"])
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), choices=BATCHES)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each system")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--compile-level", type=int, default=0, help="of transformers' continuous batching, 0 to 3")
    args = parser.parse_args()
    args.path = args.model or shape_path(args.shape, args.small)
    for what, seconds in TUTORIAL.items():
        print(f"the tutorial's T4, {what}:", ", ".join(f"{name} {value} s" for name, value in seconds.items()))
    print(f"{'workload':18} {'system':10} {'batch':>5} {'seconds':>8} {'tokens/s':>9} {'peak GiB':>9}")
    rows = []
    for row in measured(args):
        record(args.results, row)
        show(row)
        rows.append(row)
    show_ratios(rows)


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows; JAX starts, and takes its memory, after the last process of transformers has ended."""
    made = provenance()
    if not args.hf_python:
        print("no --hf-python: transformers is left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for system in args.system if args.hf_python else ():
            if system != "pagedjax":
                yield from (row | made for row in transformers_rows(args, system, Path(folder)))
    if "pagedjax" in args.system:
        request_memory_fraction(EngineConfig.gpu_memory_utilization)
        held = conditions()
        yield from (row | held for row in pagedjax_rows(args))


if __name__ == "__main__":
    main()
