"""Is pagedjax ahead of vLLM, workload by workload, on this card?

Question: output tokens per second of both on the workloads of the comparison table, and the ratio. Varied: shape and
workload. Held: what `vllm_bench.py` says, on both sides; each engine with its defaults, one configuration for all
workloads of a shape. Expected on an H200: pagedjax ahead on every row.

    python -m experiments.vs_vllm --vllm-python PATH_TO_PYTHON_WITH_VLLM [--shape llama3-8b] [--workload NAME ...]

The engines run one after the other, each in a process of its own that has the card to itself. Without --vllm-python
only pagedjax runs. `limit` is what this card allows (`limit.py`), `share` an engine's part of it. Beside them stand one
H200's figures: vLLM's, and the shares of its limit that vLLM has and that are the goal; on another card only shares
compare. Rows go to `results/vs_vllm.jsonl`, one per engine and workload.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent


class Figures(NamedTuple):
    """Output tokens a second on one H200: vLLM 0.25.1's, what the card's ceilings allow (4.27 TB/s, 790 TFLOP/s, no
    gaps between kernels), and our goal."""

    vllm: int
    limit: int
    goal: int


TABLE = {
    "llama2-7b": {
        "single-128-256": Figures(215, 320, 258),
        "batch8-128-256": Figures(1574, 2354, 1950),
        "sharegpt-like-256": Figures(7219, 9947, 8300),
        "sharegpt-like-1000": Figures(9598, 12838, 10800),
        "uniform-100-1024-256": Figures(5370, 6464, 5700),
        "prefill-2048-32-64": Figures(567, 738, 610),
    },
    "llama3-8b": {
        "single-128-256": Figures(204, 284, 238),
        "batch8-128-256": Figures(1570, 2201, 1850),
        "sharegpt-like-256": Figures(10106, 15032, 12400),
        "sharegpt-like-1000": Figures(13872, 23025, 18000),
        "prefill-2048-32-64": Figures(607, 782, 650),
        "long-16384-128-8": Figures(206, 258, 215),
    },
    "llama3.2-1b": {
        "single-128-256": Figures(715, 1722, 1100),
        "batch8-128-256": Figures(4866, 13287, 8500),
        "sharegpt-like-256": Figures(32396, 84106, 52000),
        "alpaca-like-1000": Figures(29940, 119365, 60000),
    },
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


def limits(shape: str, workloads: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What this card allows, by workload, and its ceilings; measured in a process of its own."""
    command = [sys.executable, "-m", "experiments.limit", "--json", "--shape", shape, "--workload", *workloads]
    return {row["workload"]: row for row in rows(command)}


def commands(args: argparse.Namespace, shape: str) -> dict[str, list[str]]:
    """What runs each engine on all workloads of a shape."""
    workloads = args.workload or TABLE[shape]
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
    parser.add_argument("--shape", nargs="+", default=list(TABLE), choices=TABLE)
    parser.add_argument("--workload", nargs="+", help="instead of the shape's own")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "vs_vllm.jsonl")
    args = parser.parse_args()
    run = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    print(f"{'':71} one H200's figures:")
    print(
        f"{'shape':12} {'workload':22} {'engine':9} {'tokens/s':>10} {'limit':>8} {'share':>6}  "
        f"{'vLLM':>6} {'share':>6} {'goal':>6}  {'ratio':>5}"
    )
    for shape in args.shape:
        rates: dict[str, float] = {}  # pagedjax's, by workload
        allowed = limits(shape, args.workload or TABLE[shape])
        for engine, command in commands(args, shape).items():
            for row in rows(command):
                workload, rate = row["workload"], row["best"]["output_tokens_per_s"]
                card = {name: allowed[workload][name] for name in ("limit", "copy_tb_s", "tflops")}
                held = {"engine": engine, "shape": shape, "commit": commit, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row | held | card) + "\n")
                ratio = f"{rates[workload] / rate:5.2f}" if engine == "vllm" else ""
                rates.setdefault(workload, rate)
                known = TABLE[shape].get(workload)
                shares = (
                    f"{known.vllm:6} {known.vllm / known.limit:6.2f} {known.goal / known.limit:6.2f}" if known else ""
                )
                print(
                    f"{shape:12} {workload:22} {engine:9} {rate:10.1f} {card['limit']:8.0f} "
                    f"{rate / card['limit']:6.2f}  {shares:20}  {ratio}".rstrip(),
                    flush=True,
                )


if __name__ == "__main__":
    main()
