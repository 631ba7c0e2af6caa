"""What experiments share: arguments, what a figure depends on besides the code, engines on random weights, rows."""

import argparse
import atexit
import json
import subprocess
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pagedjax import LLM
from pagedjax.bench import environment, package_data
from pagedjax.config import EngineConfig, request_memory_fraction
from pagedjax.engine import Engine

from .kernel_trials import median_seconds

RESULTS = Path(__file__).parent / "results"
COPIED, COPIED_SMALL = 1 << 29, 1 << 20  # int32 words


class Parser(argparse.ArgumentParser):
    """Arguments of the experiment `name`, with `--small` for a run of seconds on a CPU, whose rows are kept apart."""

    def __init__(self, name: str, doc: str | None, small: str = "a run of seconds on a CPU; its rows are kept apart"):
        super().__init__(prog=f"python -m experiments.{name}", description=(doc or "").splitlines()[0])
        self.name = name
        self.add_argument("--results", type=Path, help=f"instead of results/{name}.jsonl")
        self.add_argument("--small", action="store_true", help=small)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore (it has overloads)
        parsed = super().parse_args(args, namespace)
        folder = RESULTS / "small" if parsed.small else RESULTS
        parsed.results = parsed.results or folder / f"{self.name}.jsonl"
        parsed.results.parent.mkdir(parents=True, exist_ok=True)
        return parsed


def record(results: Path, row: dict[str, Any]) -> None:
    """Appends a row."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def conditions() -> dict[str, Any]:
    """What all rows of a run share: device, driver, versions, commit, day, and the rate at which the device copies
    memory, counting bytes read and written. To be called before a pool takes the memory."""
    x, copy = jnp.ones(COPIED if jax.default_backend() == "gpu" else COPIED_SMALL, jnp.int32), jax.jit(jnp.copy)
    rate = 2 * x.nbytes / median_seconds(lambda: copy(x), jax.block_until_ready) / 1e12
    return environment() | provenance() | {"copy_tb_s": rate}


def provenance() -> dict[str, str]:
    """Commit, day and driver, which are known without a device being touched."""
    commit = output("git", "describe", "--always", "--dirty")
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {"commit": commit, "date": f"{datetime.now(UTC):%Y-%m-%d}", "driver": driver}


def output(*command: str) -> str:
    """What a command prints; nothing if there is no such command."""
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except FileNotFoundError:
        return ""


def shape_path(shape: str, small: bool = False) -> str:
    """The path of a config.json: a named shape's, or, if small, of one like it that a CPU runs."""
    if small:
        return small_shape(shape)
    return shape if shape.endswith(".json") else str(package_data("shapes", shape))


def small_shape(shape: str) -> str:
    """The path of a config.json like this shape's, for a CPU; it stays until the process ends."""
    config = json.loads(package_data("shapes", shape).read_text())
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    config |= {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "num_attention_heads": 8, "head_dim": 32}
    config["num_key_value_heads"] = 8 // group
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(config, file)
    atexit.register(Path(file.name).unlink)
    return file.name


def make_engine(model: str, **settings: Any) -> Engine:
    """An engine with random weights of a config.json's shape."""
    request_memory_fraction(EngineConfig.gpu_memory_utilization)  # no effect once JAX has started
    return LLM(model=model, load_format="dummy", skip_tokenizer_init=True, **settings).engine


def engine_config(engine: Engine) -> dict[str, Any]:
    """All of an engine's settings, as a row keeps them: classes by name, the model by its file's."""
    values = asdict(engine.config)
    values |= {name: value.__name__ for name, value in values.items() if isinstance(value, type)}
    return values | {"model": Path(engine.config.model).name}
