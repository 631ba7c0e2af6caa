"""Paged attention and continuous batching for LLaMA models in JAX.

Names are loaded when first used, so that host-only modules (`pagedjax.scheduler`) import no jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .beam_search import BeamSearchOutput, BeamSearchParams
    from .config import EngineConfig
    from .engine import Engine
    from .llm import LLM
    from .request import CompletionOutput, RequestOutput
    from .rollout import RolloutBatch
    from .sampling_params import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "RequestOutput",
    "RolloutBatch",
    "SamplingParams",
    "StructuredOutputsParams",
]

_MODULES = {
    "LLM": "llm",
    "BeamSearchOutput": "beam_search",
    "BeamSearchParams": "beam_search",
    "CompletionOutput": "request",
    "Engine": "engine",
    "EngineConfig": "config",
    "RequestOutput": "request",
    "RolloutBatch": "rollout",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pagedjax' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
