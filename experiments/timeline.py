"""What does the device do in a step, and how long does it wait for the host?

Question: milliseconds of a step by part (GEMMs, attention, KV write, the rest, idle) in the middle of a workload,
beside what the bytes and operations of GEMMs and attention need at the card's own rates. Varied: shape, workload, CUDA
graphs. Held: `pagedjax bench`'s terms; `--steps` steps after the first `--after`. Expected: the device idle under 3 %
of the time; GEMMs and attention within 1.2x of what they need.

    python -m experiments.timeline [--shape llama3-8b] [--workload sharegpt-like-256] [--after 100] [--graphs]

XLA records no CUDA graphs while it is profiled, so that each kernel shows; the gaps between kernels are then longer
than users see. With --graphs it does, and idle time is what they see, but a graph may show as one event. Rows go to
`results/timeline.jsonl`, one a run.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from pagedjax import LLM
from pagedjax.bench import load_workload, package_data, run_workload
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine
from pagedjax.kv_cache import bytes_per_page
from pagedjax.scheduler import SchedulerStats

from .kernels import conditions

PEAK_TFLOPS = 790  # a bf16 product of 8192 cubed on one H200
PARTS = {
    "attention": r"paged_(decode|prefill)",
    "KV write": r"kv_write",
    "GEMMs": r"gemm|nvjet|cutlass|cublas|xmma|splitk",
    "graphs": r"graph",
    "copies": r"memcpy|memset",
}


class Event(NamedTuple):
    name: str
    start: float  # ns
    end: float


def device_events(profile: Any) -> list[Event]:
    """What ran on the streams of the first GPU, in order."""
    planes = [plane for plane in profile.planes if plane.name == "/device:GPU:0"]
    lines = [line for plane in planes for line in plane.lines if line.name.startswith("Stream")]
    events = [Event(e.name, e.start_ns, e.start_ns + e.duration_ns) for line in lines for e in line.events]
    return sorted(events, key=lambda event: event.start)


def part_of(name: str) -> str:
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def time_by_part(events: Iterable[Event]) -> dict[str, float]:
    """Nanoseconds from the first event's start to the last one's end: by part, and idle. Of events at one time, the one
    that began first counts."""
    parts: dict[str, float] = {}
    until = None
    for event in events:
        until = event.start if until is None else until
        parts["idle"] = parts.get("idle", 0.0) + max(event.start - until, 0.0)
        part = part_of(event.name)
        parts[part] = parts.get(part, 0.0) + max(event.end - max(event.start, until), 0.0)
        until = max(until, event.end)
    return parts


def needed_ms(engine: Engine, stats: SchedulerStats, copy_tb_s: float) -> dict[str, float]:
    """Of all steps counted in `stats`: weights once a step or operations, whichever takes longer, and the KV of all
    running requests once a step."""
    model, config = engine.runner.model, engine.config
    embedding = model.config.vocab_size * model.config.hidden_size
    num_params = sum(x.size for x in model.shapes.values()) - (0 if model.config.tie_word_embeddings else embedding)
    weights = stats.num_steps * num_params * jnp.dtype(model.dtype).itemsize / copy_tb_s
    operations = 2 * stats.num_scheduled_tokens * (num_params - embedding) / PEAK_TFLOPS
    kv = stats.used_slots * bytes_per_page(model.config, config.page_size, model.dtype) / config.page_size / copy_tb_s
    return {"GEMMs": max(weights, operations) / 1e9, "attention": kv / 1e9}


class Window:
    """Profiles steps (after, after + steps] of a run, and counts their work."""

    def __init__(self, engine: Engine, folder: str | Path, after: int, steps: int):
        self.engine, self.folder, self.first, self.last = engine, Path(folder), after, after + steps
        self.running = False
        self.stats = SchedulerStats()
        self.begin: dict[str, int] = {}

    def after_step(self, num_steps: int) -> None:
        now = vars(self.engine.scheduler.stats)
        if num_steps == self.first:
            self.begin = dict(now)
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        if num_steps == self.last:
            self.stop()
            self.stats = SchedulerStats(**{name: value - self.begin[name] for name, value in now.items()})

    def stop(self) -> None:
        if self.running:
            self.engine.runner.wait()
            jax.profiler.stop_trace()
            self.running = False

    def profile(self) -> Any:
        self.stop()
        files = list(self.folder.rglob("*.xplane.pb"))
        if not files or not self.stats.num_steps:
            raise ValueError(f"the run ended before step {self.last}; accepted: fewer --after and --steps")
        return ProfileData.from_file(str(files[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description="where a step's time goes on the device")
    parser.add_argument("--shape", default="llama3-8b", help="a named shape, or a config.json")
    parser.add_argument("--workload", default="sharegpt-like-256")
    parser.add_argument("--num-requests", type=int)
    parser.add_argument("--after", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--graphs", action="store_true", help="profile with CUDA graphs")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "timeline.jsonl")
    args = parser.parse_args()
    if args.graphs:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_enable_command_buffers_during_profiling=true"
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    held = conditions(1 << (29 if jax.default_backend() == "gpu" else 20))  # and before the pool takes the memory
    workload = load_workload(args.workload, args.num_requests)
    model = args.shape if args.shape.endswith(".json") else str(package_data("shapes", args.shape))
    llm = LLM(model=model, load_format="dummy", skip_tokenizer_init=True, max_model_len=workload.max_len)
    llm.engine.warm_up(progress=False)
    run_workload(llm.engine, workload, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        window = Window(llm.engine, folder, args.after, args.steps)
        run_workload(llm.engine, workload, seed=1, after_step=window.after_step)
        events = device_events(window.profile())
    if not events:
        parser.exit(1, "nothing ran on a GPU's streams\n")
    by_part, needed = time_by_part(events), needed_ms(llm.engine, window.stats, held["copy_tb_s"])
    steps = window.stats.num_steps
    row: dict[str, Any] = {
        "shape": args.shape,
        "workload": workload.name,
        "graphs": args.graphs,
        "steps": steps,
        **held,
    }
    row["ms"] = {part: ns / steps / 1e6 for part, ns in by_part.items()}
    row["needed_ms"] = {part: ms / steps for part, ms in needed.items()}
    with args.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    whole = sum(row["ms"].values())
    print(
        f"{held['device']}, {args.shape}, {workload.name}, steps {args.after} to {args.after + args.steps}, ms a step:"
    )
    for part, ms in sorted(row["ms"].items(), key=lambda item: -item[1]):
        need = f"{row['needed_ms'][part]:8.3f} needed" if part in needed else ""
        print(f"{part:10} {ms:8.3f} {ms / whole:6.1%} {need}".rstrip())


if __name__ == "__main__":
    main()
