"""Is pagedjax ahead of vLLM, workload by workload, on this card?

Question: output tokens per second of both on the workloads of the comparison table, and the ratio. Varied: shape and
workload. Held: what `vllm_bench.py` says, on both sides; each engine with its defaults, one configuration for all
workloads of a shape. Expected on an H200: pagedjax ahead on every row.

    python -m experiments.vs_vllm --vllm-python PATH_TO_PYTHON_WITH_VLLM [--shape llama3-8b] [--workload NAME ...]

The engines run one after the other, each in a process of its own that has the card to itself. Without --vllm-python
only pagedjax runs. Rows go to `results/vs_vllm.jsonl`, one per engine and workload.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORKLOADS = {
    "llama2-7b": "single-128-256 batch8-128-256 sharegpt-like-256 sharegpt-like-1000 uniform-100-1024-256 "
    "prefill-2048-32-64",
    "llama3-8b": "single-128-256 batch8-128-256 sharegpt-like-256 sharegpt-like-1000 prefill-2048-32-64 "
    "long-16384-128-8",
    "llama3.2-1b": "single-128-256 batch8-128-256 sharegpt-like-256 alpaca-like-1000",
}


def rows(command: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON lines of a process that must succeed, as they come; what else it prints is dropped."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with exit code {process.returncode}")


def commands(args: argparse.Namespace, shape: str) -> dict[str, list[str]]:
    """What runs each engine on all workloads of a shape."""
    workloads = args.workload or WORKLOADS[shape].split()
    repeat = ["--repeat", str(args.repeat)]
    ours = [sys.executable, "-m", "pagedjax.cli", "bench", "--json", "--shape", shape, *repeat, "--workload"]
    found = {"pagedjax": [*ours, *workloads]}
    if args.vllm_python:
        files = [str(ROOT / "pagedjax" / "workloads" / f"{name}.json") for name in workloads]
        config = ROOT / "pagedjax" / "shapes" / f"{shape}.json"
        script = [args.vllm_python, str(ROOT / "experiments" / "vllm_bench.py"), "--shape", str(config), *repeat]
        found["vllm"] = [*script, *files]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="pagedjax beside vLLM, in output tokens per second")
    parser.add_argument("--vllm-python", help="of an environment that has vllm")
    parser.add_argument("--shape", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--workload", nargs="+", help="instead of the shape's own")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "vs_vllm.jsonl")
    args = parser.parse_args()
    run = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    print(f"{'shape':12} {'workload':22} {'engine':9} {'tokens/s':>10} {'ratio':>6}")
    for shape in args.shape:
        rates: dict[str, float] = {}  # pagedjax's, by workload
        for engine, command in commands(args, shape).items():
            for row in rows(command):
                workload, rate = row["workload"], row["best"]["output_tokens_per_s"]
                held = {"engine": engine, "shape": shape, "commit": commit, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | held) + "\n")
                ratio = f"{rates[workload] / rate:6.2f}" if engine == "vllm" else ""
                rates.setdefault(workload, rate)
                print(f"{shape:12} {workload:22} {engine:9} {rate:10.1f} {ratio:>6}", flush=True)


if __name__ == "__main__":
    main()
