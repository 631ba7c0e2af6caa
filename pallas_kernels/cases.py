"""Named shapes of attention over pages: one catalogue for tests and compilation checks."""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """Heads, page and options of an attention op."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    dtype: str = "bfloat16"
    soft_cap: float | None = None
    sliding_window: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.head_dim**-0.5, "soft_cap": self.soft_cap, "sliding_window": self.sliding_window}


CASES = {
    "group-1": Case(8, 8),
    "group-2": Case(16, 8),
    "group-3": Case(9, 3, 64),  # SmolLM2-135M
    "group-4": Case(),  # LLaMA-3-8B
    "group-4-head-64": Case(32, 8, 64),  # LLaMA-3.2-1B
    "group-8": Case(64, 8),  # LLaMA-3-70B
    "mqa-16": Case(16, 1),
    "mqa-32": Case(32, 1),
    "mqa-32-head-64": Case(32, 1, 64),
    "page-8": Case(page_size=8),
    "page-32": Case(page_size=32),
    "page-64": Case(page_size=64),
    "page-128": Case(page_size=128),
    "page-256": Case(page_size=256),
    "float16": Case(dtype="float16"),
    "soft-cap-window": Case(soft_cap=20.0, sliding_window=100),
}
