"""How fast does transformers generate, on a named workload?

Varies: the system, and the workload. Held: `--temperature` sampling over the whole vocabulary, exact output lengths,
random prompt ids, all requests at once; bf16 on a GPU. Systems:
  generate    `model.generate` with its defaults: SDPA attention and a cache that grows, a batch padded on the left;
  flash       the same with FlashAttention-2, where that is installed;
  static      the same with a static cache, kept from trial to trial, for which `generate` compiles the decode step on
              a GPU;
  continuous  continuous batching over paged SDPA attention: what `generate_batch` runs, through its manager, which
              stays from trial to trial and lets each request have its own length.
A batch ends with its longest output, so tokens beyond a request's own length are computed and not counted. Where memory
runs out, that is a row, and the first requests go on alone, as many as get through a prefill and a last step.

Needs torch and transformers; imports neither jax nor pagedjax. One JSON line a trial:

    python -m experiments.hf_generate --model pagedjax/shapes/llama2-7b.json pagedjax/workloads/single-128-256.json
"""

import argparse
import gc
import json
import os
import platform
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig, StaticCache
from transformers.utils import is_flash_attn_2_available

Lengths = list[list[int]]  # prompt and output tokens of each request
WARM_UP = 8  # tokens, for what is not compiled for a length
ATTENTION = {"flash": "flash_attention_2"}


def load(path: Path, attention: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A folder's model, or random weights of a config.json's shape; nothing ends its outputs but their length."""
    options = {"dtype": dtype, "attn_implementation": attention}
    if path.is_dir():
        model = AutoModelForCausalLM.from_pretrained(path, **options).to(device)
    else:
        with device:
            model = AutoModelForCausalLM.from_config(LlamaConfig.from_json_file(path), **options)
    model.generation_config = GenerationConfig(pad_token_id=0)
    model.config.eos_token_id = None
    return model.eval()


def sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def make_prompts(lengths: Lengths, vocab_size: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(prompt)] for prompt, _ in lengths]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(run: Callable[[list[list[int]]], None], lengths: Lengths, vocab_size: int, seed: int) -> dict[str, Any]:
    """Seconds, output tokens a second and peak bytes of one trial."""
    prompts = make_prompts(lengths, vocab_size, seed)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    start = time.perf_counter()
    run(prompts)
    synchronize()
    seconds, tokens = time.perf_counter() - start, sum(output for _, output in lengths)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    found = {"batch": len(lengths), "seed": seed, "outcome": "ok", "seconds": seconds, "output_tokens": tokens}
    return found | {"output_tokens_per_s": tokens / seconds, "peak_bytes": peak}


def generate(model: Any, prompts: list[list[int]], num_new: int, cache: StaticCache | None, temperature: float) -> None:
    """One batch, padded on the left to its longest prompt."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    kept = {} if cache is None else {"past_key_values": cache}
    if cache is not None:
        cache.reset()
    lengths = {"max_new_tokens": num_new, "min_new_tokens": num_new}
    out = model.generate(ids, attention_mask=mask, **lengths, **sampling(temperature), **kept)
    assert out.shape == (len(prompts), width + num_new), f"outputs of shape {tuple(out.shape)}"


@torch.inference_mode()
def fits(model: Any, lengths: Lengths, static: bool, count: int) -> bool:
    """Whether so many of the first requests get through a prefill and, with the cache as it is then, a last step."""
    width, num_new = (max(column) for column in zip(*lengths[:count], strict=True))
    try:
        config, total = model.config, width + num_new
        cache = StaticCache(config=config, max_cache_len=total) if static else DynamicCache(config=config)
        ids = torch.zeros(count, width, dtype=torch.long, device=model.device)
        mask = torch.ones(count, total, dtype=torch.long, device=model.device)
        mask[0, 0] = 0  # as padding has it: without any, attention needs no mask
        step = partial(model, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step(ids, attention_mask=mask[:, :width])
        if not static:
            grown = (count, config.num_key_value_heads, num_new - 1, config.head_dim)
            for layer in cache.layers:
                layer.update(*(torch.zeros(grown, dtype=model.dtype, device=model.device) for _ in range(2)))
        step(ids[:, :1], attention_mask=mask[:, : width + 1] if static else mask)
        fine = True
    except torch.OutOfMemoryError:
        fine = False
    ids = mask = cache = layer = step = None  # before what they hold can be freed
    free()
    return fine


def dense(model: Any, lengths: Lengths, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trials of one batch, of fewer requests where memory runs out."""
    static, vocab_size = args.system == "static", model.config.vocab_size
    settings = {"attention": model.config._attn_implementation, "cache": "static" if static else "dynamic"}
    settings |= {"compiled": static and model.device.type == "cuda", "padding": "left"}
    settings["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF", "default")
    most = len(lengths)  # that are worth a probe
    while lengths:
        (width, num_new), message = (max(column) for column in zip(*lengths, strict=True)), ""
        # One for all trials: CUDA graphs are recorded for a cache's addresses.
        cache = StaticCache(config=model.config, max_cache_len=width + num_new) if static else None
        run = partial(generate, model, cache=cache, temperature=args.temperature)
        try:
            warm_up = num_new if static else min(WARM_UP, num_new)
            run(make_prompts(lengths, vocab_size, args.seed), num_new=warm_up)
            for trial in range(args.repeat):
                found = measured(partial(run, num_new=num_new), lengths, vocab_size, args.seed + 1 + trial)
                yield {"trial": trial, "settings": settings, **found}
            return
        except torch.OutOfMemoryError as error:
            message = str(error).splitlines()[0]  # the error itself keeps the run's arrays alive
        cache = run = None  # so do these
        free()
        yield {"batch": len(lengths), "settings": settings, "outcome": "out of memory", "message": message}
        counts = range(max(most // 32, 1), most, max(most // 32, 1))
        num_fitting = bisect_left(counts, True, key=lambda count: not fits(model, lengths, static, count))
        lengths = lengths[: counts[num_fitting - 1]] if num_fitting else []
        most = len(lengths) * 7 // 8  # a run needs more than the probe of it, where memory lies in pieces


def continuous(model: Any, lengths: Lengths, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Trials of continuous batching, after a warm-up of a few tokens, or of all where they are compiled for."""
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    longest, num_new = (max(column) for column in zip(*lengths, strict=True))
    config = ContinuousBatchingConfig(default_compile_level=args.compile_level, seed=args.seed)
    generation = GenerationConfig(max_new_tokens=num_new, eos_token_id=-1, pad_token_id=0, **sampling(args.temperature))
    hints = WorkloadHints(longest, num_new, len(lengths))

    def run(prompts: list[list[int]], most: int = num_new) -> None:
        wanted = {}
        for prompt, (_, output) in zip(prompts, lengths, strict=True):
            new = min(output, most)
            wanted[manager.add_request(prompt, max_new_tokens=new, eos_token_id=-1)] = new
        while wanted:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("continuous batching has stopped")
            if result is not None and result.is_finished():
                assert len(result.generated_tokens) == wanted.pop(result.request_id), result.error

    arguments = {"continuous_batching_config": config, "workload_hints": hints}
    with model.continuous_batching_context_manager(generation, **arguments) as manager:
        run(make_prompts(lengths, model.config.vocab_size, args.seed), num_new if args.compile_level else WARM_UP)
        settings = {"attention": model.config._attn_implementation}
        settings |= {name: value for name, value in vars(manager.continuous_batching_config).items() if plain(value)}
        for trial in range(args.repeat):
            found = measured(run, lengths, model.config.vocab_size, args.seed + 1 + trial)
            yield {"trial": trial, "settings": settings, **found}


def plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | tuple)


SYSTEMS = {"generate": dense, "flash": dense, "static": dense, "continuous": continuous}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder, or a config.json for random weights")
    parser.add_argument("--system", default="generate", choices=SYSTEMS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--compile-level", type=int, default=0, help="of continuous batching: 0, none, to 3")
    parser.add_argument("workloads", type=Path, nargs="+", help="JSON files with lengths")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    held = {"system": args.system, "model": args.model.name, "dtype": str(dtype).removeprefix("torch.")}
    held |= {"transformers": transformers.__version__, "torch": torch.__version__, "temperature": args.temperature}
    held["python"] = platform.python_version()
    held["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    installed = args.system != "flash" or is_flash_attn_2_available()
    model = load(args.model, ATTENTION.get(args.system, "sdpa"), dtype, device) if installed else None
    for path in args.workloads:
        lengths = json.loads(path.read_text())["lengths"]
        missing = {"batch": len(lengths), "outcome": "not installed", "message": "flash_attn"}
        torch.manual_seed(args.seed)
        for row in SYSTEMS[args.system](model, lengths, args) if installed else [missing]:
            print(json.dumps({"workload": path.stem, **row, **held}), flush=True)
        free()


if __name__ == "__main__":
    main()
