"""Runs every experiment that this machine can, and draws the figures and tables anew: `make results`.

An experiment's rows are replaced when it has ended well, those of parts that were not run excepted; else they stay as
they are. What needs a GPU is left out without one; transformers is compared where torch is installed.

    python -m experiments.regenerate [NAME ...] [--small]

With `--small` small runs go to results/small/, one after the other, and nothing is replaced or drawn: a check that all
of them run.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from .common import RESULTS, read_rows, record

ANYWHERE = {
    "fragmentation": [""],
    "example_eviction": [""],
    "page_size": ["--part prefix"],
    "rl": [""],
}
ON_A_GPU = {
    "kernels": [""],
    "vs_vllm": [""],
    "latency": ["--rate 52 --num-requests 450"],
    "page_size": [""],
    "dense_kv": [
        "",
        "--workload alpaca-like-1000 --first 512 --max-num-seqs 384 --part throughput",
    ],
    "vs_hf": ["--batch 1 8 256"],
    "quality": [""],
    "kv_memory": [""],
    "sharing": ["--question prefix cost", "--question samples beams --shape llama3.2-1b --first 48"],
    "recovery": ["--shape llama3-8b", "--shape llama2-7b --tokens 512 1024 4096"],
    "preemption": ["--shape llama3-8b --after 150 --steps 200"],
    "serving": ["--shape llama3-8b", "--shape llama3.2-1b"],
    "structured": [""],
    "rollouts": ["--part update", "--part loop"],
    "invariance": [""],
    "logprob_gap": [""],
}
SMALL = [name for name in ANYWHERE | ON_A_GPU if name not in ("kernels", "vs_vllm", "latency")]


def run(name: str, arguments: list[str], results: Path) -> bool:
    """Whether all of an experiment's runs ended well; their rows go to `results`."""
    for more in arguments:
        command = [sys.executable, "-m", f"experiments.{name}", *more.split(), "--results", str(results)]
        if name == "vs_hf" and importlib.util.find_spec("torch"):
            command += ["--hf-python", sys.executable]
        print("+", " ".join(command[1:]), flush=True)
        start = time.monotonic()
        done = subprocess.run(command, cwd=RESULTS.parent.parent, check=False)
        print(f"{name}: {time.monotonic() - start:.0f} s, exit code {done.returncode}", flush=True)
        if done.returncode:
            return False
    return True


def replace(old: Path, new: Path) -> None:
    """Puts the new rows in place of the old ones, but for parts that the new ones have none of."""
    rows = read_rows(new)
    parts = {row.get("part") for row in rows}
    kept = [row for row in (read_rows(old) if old.exists() else []) if row.get("part") not in parts]
    old.unlink(missing_ok=True)
    for row in kept + rows:
        record(old, row)


def main() -> None:
    parser = argparse.ArgumentParser(description="runs every experiment that this machine can")
    everything = ANYWHERE | ON_A_GPU
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(everything))
    parser.add_argument("--small", action="store_true", help="a run of seconds of each on a CPU")
    args = parser.parse_args()
    if unknown := set(args.names) - set(everything):
        parser.error(f"{', '.join(sorted(unknown))}; accepted: {', '.join(everything)}")
    gpu = jax.default_backend() == "gpu"
    able = {name: ["--small"] for name in SMALL} if args.small else everything if gpu else ANYWHERE
    wanted = [name for name in args.names or able if name in able]
    if left := [name for name in args.names or everything if name not in wanted]:
        print(f"left out, {'no small form' if args.small else 'for want of a GPU'}: {', '.join(left)}")
    failed = []
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / f"{name}.jsonl"
            if not run(name, able[name], RESULTS / "small" / made.name if args.small else made):
                failed.append(name)
            elif not args.small:
                replace(RESULTS / made.name, made)
    if not args.small:
        subprocess.run([sys.executable, "-m", "experiments.report"], cwd=RESULTS.parent.parent, check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
