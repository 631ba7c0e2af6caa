"""Named shapes of attention over pages: one catalogue for tests, compilation checks and benchmarks."""

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
    "group-7": Case(28, 4),
    "mqa-12": Case(12, 1),
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


class Benchmark(NamedTuple):
    """An op on `batch` sequences of `kv_len` tokens, with FlashAttention-3's figure as vLLM builds it and our goal.

    Figures are one H200's: microseconds in decode, TFLOP/s in prefill of whole prompts.
    """

    kind: str
    batch: int
    kv_len: int
    case: Case
    fa3: float | None = None
    goal: float | None = None


GQA = CASES["group-4"]
MHA = GQA._replace(num_kv_heads=32)  # LLaMA-2-7B
HEAD_64 = CASES["group-4-head-64"]
BENCHMARKS = (
    *(Benchmark("decode", 64, 2048, GQA._replace(page_size=n)) for n in (8, 32, 128)),
    Benchmark("decode", 64, 2048, GQA, 184, 130),
    Benchmark("decode", 64, 2048, CASES["page-64"], 186, 130),
    Benchmark("decode", 64, 2048, CASES["page-256"], 165, 130),
    Benchmark("decode", 256, 1024, GQA, 308, 256),
    Benchmark("decode", 256, 1024, MHA, 1053, 1000),
    Benchmark("decode", 64, 2048, MHA, 540, 497),
    Benchmark("decode", 64, 512, MHA, 170, 135),
    Benchmark("decode", 8, 8192, GQA, 116, 72),
    Benchmark("decode", 1, 8192, GQA, 65, 20),
    Benchmark("decode", 1, 131072, GQA, 173, 138),
    Benchmark("decode", 64, 2048, HEAD_64, 128, 72),
    Benchmark("prefill", 4, 2048, GQA, 465, 520),
    Benchmark("prefill", 4, 2048, MHA, 439, 480),
    Benchmark("prefill", 1, 8192, GQA, 619, 640),
    Benchmark("prefill", 16, 512, GQA, 229, 320),
    Benchmark("prefill", 4, 2048, HEAD_64, 316, 330),
    Benchmark("prefill", 4, 2048, CASES["page-8"], None, 480),
)
