"""What does the device do in a step, and how long does it wait?

Question: milliseconds of a step by part (GEMMs, attention, KV write, the rest) in the middle of a workload, beside what
the bytes and operations of GEMMs and attention need at the card's own rates; and what is left of the step's time, when
nothing ran. Varied: shape, workload. Held: `pagedjax bench`'s terms; `--steps` steps after the first `--after`, of the
same requests, first timed, then profiled. Expected: nothing runs in under 5 % of the time, most of that between the
kernels of a CUDA graph; GEMMs and attention within 1.2x of what they need.

    python -m experiments.timeline [--shape llama3-8b] [--workload sharegpt-like-256 ...] [--after 100] [--steps 50]

XLA records no CUDA graphs while it is profiled, so that each kernel shows; hence the step's time is taken without.
Rows go to `results/timeline.jsonl`, one a workload.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from pagedjax import LLM
from pagedjax.bench import Workload, load_workload, run_workload
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine
from pagedjax.kv_cache import bytes_per_page
from pagedjax.schedule import SchedulerStats

from .common import conditions, record, shape_path

PEAK_TFLOPS = 790  # a bf16 product of 8192 cubed on one H200
PARTS = {
    "attention": r"paged_(decode|prefill)",
    "KV write": r"(kv|rotate)_write",
    "GEMMs": r"gemm|nvjet|cutlass|cublas|xmma|splitk|(project|project_qkv|add)_mosaic",
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
    """Times steps (after, after + steps] of a run and counts their work; with a folder, profiles them."""

    def __init__(self, engine: Engine, after: int, steps: int, folder: str | Path | None = None):
        self.engine, self.first, self.last, self.folder = engine, after, after + steps, folder
        self.running = False
        self.stats, self.seconds = SchedulerStats(), 0.0
        self.begin: dict[str, int] = {}

    def after_step(self, num_steps: int) -> None:
        now = vars(self.engine.scheduler.stats)
        if num_steps in (self.first, self.last):
            self.engine.runner.wait()  # or a long step in flight at one end would count, and not its kernels
        if num_steps == self.first:
            self.begin = dict(now)
            if self.folder:
                jax.profiler.start_trace(str(self.folder))
            self.running, self.seconds = True, time.perf_counter()
        if num_steps == self.last:
            self.seconds = time.perf_counter() - self.seconds
            self.stop()
            self.stats = SchedulerStats(**{name: value - self.begin[name] for name, value in now.items()})

    def stop(self) -> None:
        if self.running and self.folder:
            self.engine.runner.wait()
            jax.profiler.stop_trace()
        self.running = False

    def profile(self) -> Any:
        self.stop()
        files = list(Path(self.folder or "").rglob("*.xplane.pb")) if self.stats.num_steps else []
        if not files:
            raise ValueError(f"the run ended before step {self.last}; accepted: fewer --after and --steps")
        return ProfileData.from_file(str(files[0]))


def measure(engine: Engine, workload: Workload, after: int, steps: int) -> tuple[list[Event], Window]:
    """The events of a profiled window, and the same window without the profiler."""
    for seed in (0, 1):  # compiles what is needed; records graphs
        run_workload(engine, workload, seed)
    timed = Window(engine, after, steps)
    run_workload(engine, workload, seed=1, after_step=timed.after_step)
    with tempfile.TemporaryDirectory() as folder:
        profiled = Window(engine, after, steps, folder)
        run_workload(engine, workload, seed=1, after_step=profiled.after_step)
        return device_events(profiled.profile()), timed


def main() -> None:
    parser = argparse.ArgumentParser(description="where a step's time goes on the device")
    parser.add_argument("--shape", default="llama3-8b", help="a named shape, or a config.json")
    parser.add_argument("--workload", nargs="+", default=["sharegpt-like-256"])
    parser.add_argument("--num-requests", type=int)
    parser.add_argument("--after", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "timeline.jsonl")
    args = parser.parse_args()
    request_memory_fraction(EngineConfig.gpu_memory_utilization)
    held = conditions()  # and before the pool takes the memory
    workloads = [load_workload(name, args.num_requests) for name in args.workload]
    max_len = max(workload.max_len for workload in workloads)
    settings = {"max_model_len": max_len, "enable_prefix_caching": False}  # prompts come again
    engine = LLM(model=shape_path(args.shape), load_format="dummy", skip_tokenizer_init=True, **settings).engine
    for workload in workloads:
        events, timed = measure(engine, workload, args.after, args.steps)
        if not events:
            parser.exit(1, "nothing ran on a GPU's streams\n")
        num_steps, whole = timed.stats.num_steps, timed.seconds / timed.stats.num_steps * 1e3
        parts = {part: ns / num_steps / 1e6 for part, ns in time_by_part(events).items()}
        parts["nothing"] = whole - sum(ms for part, ms in parts.items() if part != "idle")
        parts.pop("idle", None)  # of a run without graphs
        needed = {part: ms / num_steps for part, ms in needed_ms(engine, timed.stats, held["copy_tb_s"]).items()}
        row = {"shape": args.shape, "workload": workload.name, "after": args.after, "steps": num_steps, **held}
        row |= {
            "tokens": timed.stats.num_scheduled_tokens / num_steps,
            "ms": parts,
            "needed_ms": needed,
            "step_ms": whole,
        }
        record(args.results, row)
        print(
            f"{held['device']}, {args.shape}, {workload.name}, steps {args.after} to {args.after + args.steps}, "
            f"{row['tokens']:.0f} tokens and {whole:.3f} ms a step:"
        )
        for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
            need = f"{needed[part]:8.3f} needed" if part in needed else ""
            print(f"{part:10} {ms:8.3f} {ms / whole:6.1%} {need}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
