"""How fast is vLLM on a named workload, in the terms of `pagedjax bench`?

Varies: the workload, one engine for all of them. Held: random prompt ids, greedy, exact output lengths, bf16, dummy
weights, prefix caching off, no detokenization, all requests at once; vLLM's own defaults for everything else.

Needs vllm; imports neither jax nor pagedjax, so it runs in vLLM's own environment. One JSON line a workload:

    python experiments/vllm_bench.py --shape pagedjax/shapes/llama3-8b.json pagedjax/workloads/single-128-256.json
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import vllm


def run(llm: Any, lengths: list[tuple[int, int]], vocab_size: int, seed: int) -> dict[str, float]:
    """Output tokens a second of one run."""
    rng = random.Random(seed)
    prompts = [{"prompt_token_ids": [rng.randrange(vocab_size) for _ in range(prompt)]} for prompt, _ in lengths]
    common = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    params = [vllm.SamplingParams(max_tokens=output, **common) for _, output in lengths]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert [len(o.outputs[0].token_ids) for o in outputs] == [output for _, output in lengths]
    return {"seconds": seconds, "output_tokens_per_s": sum(output for _, output in lengths) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=Path, required=True, help="a config.json")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("workloads", type=Path, nargs="+")
    args = parser.parse_args()
    workloads = [json.loads(path.read_text()) for path in args.workloads]
    config = json.loads(args.shape.read_text())
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(args.shape, Path(folder) / "config.json")
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=max(sum(pair) for workload in workloads for pair in workload["lengths"]),
            seed=args.seed,
        )
        for path, workload in zip(args.workloads, workloads, strict=True):
            runs = [run(llm, workload["lengths"], config["vocab_size"], args.seed + i) for i in range(1 + args.repeat)][
                1:
            ]
            best = max(runs, key=lambda run: run["output_tokens_per_s"])
            print(json.dumps({"workload": path.stem, "vllm": vllm.__version__, "best": best, "runs": runs}), flush=True)


if __name__ == "__main__":
    main()
