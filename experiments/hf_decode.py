"""How long does one decode step take in Hugging Face transformers, on the same weights and the same CPU?

Varies: the batch size and the context length, one point a run. Held: the GGUF's weights, dequantised to
`--dtype`; SDPA attention; greedy choice; torch's own number of threads. Expected: at batch 1 the step is
bound by reading the weights once (538 MB for SmolLM2-135M in float32), so that eight sequences cost far less
than eight times as much.

Two KV caches can be asked for. `static` writes the new keys and values in place and attends over the whole
allocation under a mask; `dynamic`, transformers' default, concatenates, and so copies the cache at every
step. `--compile` runs the model through torch.compile, which compiles during the warm-up steps.

Needs torch, transformers and gguf; imports neither jax nor pagedjax. Prints one JSON line:

    python -m experiments.hf_decode --model SmolLM2-135M-Instruct.Q4_1.gguf --batch 8 --context 256
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from .hf_gguf import load_llama

NUM_WARM_UP = 3


@torch.inference_mode()
def time_decode(model: LlamaForCausalLM, batch: int, context: int, steps: int, cache: str) -> list[float]:
    """Seconds of each of `steps` decode steps, after `batch` sequences of `context` random ids."""
    if cache == "static":
        kv = StaticCache(config=model.config, max_cache_len=context + NUM_WARM_UP + steps)
    else:
        kv = DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, context), generator=generator)
    seconds = []
    for _ in range(1 + NUM_WARM_UP + steps):
        start = time.perf_counter()
        logits = model(ids, past_key_values=kv, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        seconds.append(time.perf_counter() - start)
    return seconds[1 + NUM_WARM_UP :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a LLaMA GGUF file")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=256, help="tokens of each prompt; warm-up comes on top")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cache", choices=["static", "dynamic"], default="static")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; for the static cache")
    args = parser.parse_args()

    model = load_llama(args.model, getattr(torch, args.dtype))
    if args.compile:
        model.compile(dynamic=False)
    seconds = time_decode(model, args.batch, args.context, args.steps, args.cache)
    row = {
        "engine": f"transformers {transformers.__version__}",
        "torch": torch.__version__,
        "model": args.model.name,
        "batch": args.batch,
        "context": args.context,
        "steps": args.steps,
        "dtype": args.dtype,
        "cache": args.cache,
        "compile": args.compile,
        "threads": torch.get_num_threads(),
        "median_ms": round(1e3 * statistics.median(seconds), 2),
        "min_ms": round(1e3 * min(seconds), 2),
        "max_ms": round(1e3 * max(seconds), 2),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
