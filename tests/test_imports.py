"""Who imports whom: read from the source, and once from an interpreter that has imported nothing else."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOST_ONLY = ("", ".request", ".page_pool", ".allocation", ".slots", ".scheduler", ".batch", ".sampling_params")
MAX_LINES = 300


def python_files(*folders: str) -> list[Path]:
    """Source files under folders of the repository, each once: links are not followed."""
    found = []
    for folder in folders:
        for parent, _, names in os.walk(ROOT / folder):
            found += [Path(parent) / name for name in sorted(names) if name.endswith(".py")]
    return sorted(found)


def module_name(path: Path) -> str:
    """The name under which a file is imported: models and pallas_kernels are parts of pagedjax."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("models", "pallas_kernels"):
        parts.insert(0, "pagedjax")
    return ".".join(parts)


def resolve(source: str, module: str) -> Iterator[str]:
    """Every module (or name within one) that the source of `module` imports, anywhere in it, by its full name."""
    package = module.removesuffix(".__init__").split(".")
    package = package if module.endswith(".__init__") else package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def imports(path: Path) -> set[str]:
    return set(resolve(path.read_text(encoding="utf-8"), module_name(path)))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def offenders(paths: list[Path], *packages: str) -> list[str]:
    """Files that import anything within the packages."""
    return [str(p.relative_to(ROOT)) for p in paths for name in imports(p) if any(within(name, k) for k in packages)]


ENGINE = [path for path in python_files("pagedjax") if "server" not in path.relative_to(ROOT).parts]
MODELS, KERNELS = python_files("models"), python_files("pallas_kernels")
LEAVES = python_files("experiments", "tests")
SERVER = [path for path in python_files("pagedjax") if path not in ENGINE]


def run_python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints, started in a folder, with this repository's pagedjax."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", HOST_ONLY)
def test_host_modules_load_no_jax(module: str, tmp_path: Path):
    loaded = run_python(f"import sys, pagedjax{module}; print(*sys.modules)", tmp_path).split()
    assert "pagedjax" in loaded and not {"jax", "jaxlib", "flax", "transformers"} & set(loaded)


def test_a_user_s_own_models_and_kernels_are_not_mistaken_for_ours(tmp_path: Path):
    for name in ("models", "pallas_kernels"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    code = "import pagedjax.models.config as m, pagedjax.pallas_kernels.tuning as k; print(m.__name__, k.__name__)"
    assert run_python(code, tmp_path) == "pagedjax.models.config pagedjax.pallas_kernels.tuning"


def test_kernels_import_nothing_of_ours():
    ours = [name for path in KERNELS for name in imports(path) if within(name, "pagedjax")]
    assert [name for name in ours if not within(name, "pagedjax.pallas_kernels")] == []
    assert offenders(KERNELS, "models", "experiments", "tests") == []


def test_models_import_neither_engine_nor_kernels():
    ours = [name for path in MODELS for name in imports(path) if within(name, "pagedjax")]
    assert [name for name in ours if not within(name, "pagedjax.models")] == []
    assert offenders(MODELS, "pallas_kernels", "experiments", "tests") == []


def test_other_packages_reach_kernels_through_the_dispatcher_alone():
    kernels = {name for path in ENGINE + SERVER for name in imports(path) if within(name, "pagedjax.pallas_kernels")}
    assert kernels and all(within(name, "pagedjax.pallas_kernels.dispatch") for name in kernels)


def test_the_bench_is_imported_by_the_command_line_alone():
    others = [path for path in ENGINE + SERVER + MODELS + KERNELS if path.name not in ("cli.py", "bench.py")]
    assert offenders(others, "pagedjax.bench") == []
    assert set(offenders(ENGINE, "pagedjax.bench")) == {"pagedjax/cli.py"}


def test_the_server_is_imported_by_the_command_line_alone():
    others = [path for path in ENGINE + MODELS + KERNELS if path.name != "cli.py"]
    assert offenders(others, "pagedjax.server") == []


def test_nothing_of_the_package_imports_experiments_or_tests():
    assert offenders(ENGINE + SERVER + MODELS + KERNELS, "experiments", "tests") == []


def test_models_and_kernels_are_imported_as_parts_of_pagedjax_everywhere():
    everything = ENGINE + SERVER + MODELS + KERNELS + LEAVES
    assert len(everything) > 30
    assert offenders(everything, "models", "pallas_kernels") == []


@pytest.mark.parametrize("path", ENGINE + MODELS + KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_reads_in_one_sitting(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < MAX_LINES


@pytest.mark.parametrize(
    ("source", "module", "names"),
    [
        ("import models.llama as m", "pagedjax.step", {"models.llama"}),
        ("from models import llama", "pagedjax.step", {"models.llama"}),
        ("from .models import llama", "pagedjax.step", {"pagedjax.models.llama"}),
        ("from . import batch, step", "pagedjax.engine", {"pagedjax.batch", "pagedjax.step"}),
        ("from .. import step", "pagedjax.models.llama", {"pagedjax.step"}),
        ("from .config import X", "pagedjax.__init__", {"pagedjax.config.X"}),
        ("def f():\n    from pagedjax.bench import g", "pagedjax.llm", {"pagedjax.bench.g"}),
    ],
)
def test_every_way_to_import_is_understood(source: str, module: str, names: set[str]):
    assert set(resolve(source, module)) == names
