"""Which of XLA's options make a decode step faster?

Question: XLA chooses kernels for products and fusions, and how a CUDA graph starts them; what do its options change?
Varied: one group of options at a time, batch, shape. Held: XLA's own products, what `step_parts` holds; variants of a
batch are compiled one after the other, then timed in turns. `concurrent` is the default compiled once more while three
others compile, since choices between GEMMs are timed on the device. Expected: programmatic launches win a
microsecond a kernel; the rest within noise.

    python -m experiments.compiler_options [--shape llama3.2-1b] [--batch 16 64 256] [--layers 4] [--variant NAME ...]

Rows go to `results/compiler_options.jsonl`; with --text FOLDER the optimised programs go there.
"""

import argparse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pagedjax.batch import Bucket
from pagedjax.bench import package_data
from pagedjax.models.llama import Llama
from pagedjax.models.load import dummy_params, open_checkpoint, read_config
from pagedjax.pallas_kernels.dispatch import Heads, paged_ops
from pagedjax.sampler import Features
from pagedjax.step import Step

from .common import conditions, record
from .step_parts import PAGE_SIZE, Trial, all_decoding, step_ms

ROUNDS = 5
VARIANTS: dict[str, dict[str, bool | int | str]] = {
    "default": {},
    "concurrent": {},
    "programmatic launch": {"xla_gpu_enable_pdl": True, "xla_gpu_enable_pdl_launch": True},
    "no programmatic launch": {"xla_gpu_enable_pdl": False, "xla_gpu_enable_pdl_launch": False},
    "no cuBLAS": {"xla_gpu_cublas_fallback": False},
    "no Triton products": {"xla_gpu_enable_triton_gemm": False},
    "Triton for any product": {"xla_gpu_triton_gemm_any": True},
    "all tilings": {"xla_gpu_exhaustive_tiling_search": True},
    "cuBLASLt": {"xla_gpu_enable_cublaslt": True},
    "product fusion, second version": {"xla_gpu_experimental_gemm_fusion_v2": True},
    "fusions tuned": {"xla_gpu_experimental_enable_fusion_autotuner": True},
    "fusions through Triton": {"xla_gpu_experimental_enable_fusion_block_level_rewriter": True},
    "no graphs": {"xla_gpu_enable_command_buffer": ""},
}


def compile_variants(lowered: Any, names: list[str]) -> dict[str, Any]:
    """What compiles, by name."""
    compiled = {}
    for name in names:
        try:
            if name == "concurrent":
                with ThreadPoolExecutor(4) as threads:
                    compiled[name] = next(iter(threads.map(lambda _: lowered.compile(), range(4))))
            else:
                compiled[name] = lowered.compile(compiler_options=VARIANTS[name])
        except jax.errors.JaxRuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0][:150]}", flush=True)
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(description="times a decode step under XLA's options")
    parser.add_argument("--shape", default="llama3.2-1b", help="a named shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--text", type=Path, help="a folder for the optimised programs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "compiler_options.jsonl")
    args = parser.parse_args()
    config = replace(read_config(open_checkpoint(str(package_data("shapes", args.shape)))[0]), num_layers=args.layers)
    model = Llama(config, fused=True, dtype=jnp.dtype("bfloat16"))
    params = jax.block_until_ready(dummy_params(model, 0))
    ops = paged_ops("auto", Heads(config.head_dim, config.num_q_heads // config.num_kv_heads, PAGE_SIZE, model.dtype))
    held = conditions() | {"shape": args.shape, "layers": args.layers, "context": args.context}
    print(f"{held['device']}, {args.shape}, {args.layers} layers, copy {held['copy_tb_s']:.2f} TB/s, ms a step")
    for batch in args.batch:
        trial = Trial(model, params, ops, batch, args.context)
        step = Step(model, ops._replace(linear=None), PAGE_SIZE, trial.pages_per_seq * PAGE_SIZE, batch, Counter())
        bucket = Bucket(True, batch, batch, batch)
        packed = all_decoding(bucket)
        lowered = step.decode(bucket, Features()).lower(trial.flat, *trial.state(), packed)
        compiled = compile_variants(lowered, args.variant)
        times: dict[str, list[float]] = {name: [] for name in compiled}
        for _ in range(ROUNDS):
            for name, function in compiled.items():
                times[name].append(step_ms(function, trial.flat, *trial.state(), packed)[0])
        for name, values in times.items():
            row = {"batch": batch, "variant": name, "options": VARIANTS[name], "ms": float(np.median(values))}
            print(f"{batch:5} {name:32} {row['ms']:8.3f} ({min(values):.3f} to {max(values):.3f})", flush=True)
            record(args.results, row | held)
            if args.text:
                file_name = f"{args.shape}-{batch}-{name.replace(' ', '-')}.txt"
                (args.text / file_name).write_text(compiled[name].as_text())


if __name__ == "__main__":
    main()
