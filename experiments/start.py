"""How long until the first tokens?

Question: seconds from a process's start to its first tokens, with an empty cache of compiled step functions and with
the one that the first process left; and to the end of `warm_up`, when every bucket is compiled. Varied: shape, cache.
Held: random weights made on the device, 8 prompts of 128 tokens, greedy. Expected on one H200 for a 7B shape: first
tokens within 60 s with an empty cache, within 15 s with a full one.

    python -m experiments.start [--shape llama2-7b]

Rows go to `results/start.jsonl`, one a process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .vs_vllm import ROOT


def child(shape: str, cache: str, started: float) -> None:
    """What the parent times; prints one JSON line."""
    seconds = {"python": time.time() - started}
    from pagedjax import LLM, SamplingParams
    from pagedjax.bench import package_data
    from pagedjax.config import request_memory_fraction

    request_memory_fraction(0.9)
    import jax

    jax.devices()
    seconds["jax"] = time.time() - started
    model = shape if shape.endswith(".json") else str(package_data("shapes", shape))
    llm = LLM(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=2048,
        compilation_cache_dir=cache,
    )
    seconds["engine"] = time.time() - started
    prompts = [[i * 8 + j for j in range(128)] for i in range(8)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    seconds["first tokens"] = time.time() - started
    llm.engine.warm_up(progress=False)
    seconds["warm-up"] = time.time() - started
    print(json.dumps({"seconds": seconds, "device": jax.devices()[0].device_kind}))


def main() -> None:
    parser = argparse.ArgumentParser(description="times starts with an empty and a full cache")
    parser.add_argument("--shape", default="llama2-7b", help="a named shape, or a config.json")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "start.jsonl")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.shape, args.child[0], float(args.child[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty", "full"):
            command = [sys.executable, "-m", "experiments.start", "--shape", args.shape]
            command += ["--child", folder, str(time.time())]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            row = {"shape": args.shape, "cache": cache} | json.loads(done.stdout.splitlines()[-1])
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{args.shape}, {cache} cache:", {k: round(v, 1) for k, v in row["seconds"].items()}, flush=True)


if __name__ == "__main__":
    main()
