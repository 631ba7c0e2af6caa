"""EngineConfig: the only knobs. The one place that reads environment variables."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from .allocation import ALLOCATIONS, Allocation
from .page_pool import Eviction, LeastRecentlyUsed

SIZES = ("max_num_seqs", "max_num_batched_tokens", "max_mixed_tokens")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("auto", "dummy")
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")
PREEMPTION_MODES = ("recompute", "swap")
SAMPLE_ROWS = 256  # that the sampler takes at one time, unless all are greedy: it makes arrays of vocabulary size
PROMPT_LOGPROB_ROWS = 64
MEMORY_FRACTION_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
MEMORY_FRACTION_VARIABLES = (MEMORY_FRACTION_VARIABLE, "XLA_CLIENT_MEM_FRACTION")
DEFAULT_MEMORY_FRACTION = 0.75  # JAX's own


class PlatformDefaults(NamedTuple):
    """What differs between a GPU and a CPU."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_mixed_tokens: int
    min_decode_rows: int  # of the smallest decode bucket
    min_mixed_tokens: int  # of the smallest mixed bucket
    max_decode_gap: int | None  # rows between decode buckets, more where they are large; a power of two
    fuse_projections: bool
    decode_steps: int  # in one dispatch, of models of up to SMALL_MODEL bytes

    @property
    def bucket_limits(self) -> tuple[int, int, int | None]:
        """As `batch.Buckets` takes them."""
        return self.min_decode_rows, self.min_mixed_tokens, self.max_decode_gap


# GPUs: many rows, since a step of a small model has much that does not grow with them; few small buckets, since a
# step of 16 rows takes hardly longer than one of 8, one of 256 tokens hardly longer than one of 64, and each bucket
# takes seconds to compile; but beyond some 150 rows operations bound a step, and padding costs what it weighs. Fused
# projections pay; on a CPU they cost 15 to 40 %. Several decode steps in a dispatch pay where a step of few rows takes
# hardly longer than the host needs for it.
SMALL_MODEL = 4 << 30
PLATFORM_DEFAULTS = {
    "gpu": PlatformDefaults(1024, 8192, 512, 16, 256, 64, True, 4),
    "cpu": PlatformDefaults(32, 1024, 1024, 1, 16, None, False, 1),
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs; ValueError on a bad value, naming the field.

    model: a folder, a hub id, a .gguf file, or, with load_format "dummy", a config.json. dtype "auto": float32 on a
    CPU; elsewhere the checkpoint's own, bfloat16 for a float32 one. max_model_len None: the model's context, or
    what the pool can hold if that is less. num_pages None: from gpu_memory_utilization, the share of the device's
    memory that weights, temporaries and pool may take together; on a CPU the pool takes cpu_kv_cache_bytes.
    lookahead: how many dispatches run ahead of reading tokens back. decode_steps: how many steps one of them takes
    where nothing waits, at most page_size; None: several on a GPU for small models, else one. max_mixed_tokens: a
    step's tokens where a prompt or two join rows that decode, which bounds the time between these rows' tokens
    (more if there are many rows, or more prompts). max_logprobs: the cap on logprobs, -1 for the vocabulary.
    compilation_cache_dir: where `LLM` has JAX keep its compilations, None for the user's cache folder unless JAX
    has one. enable_prefix_caching: requests that begin with the same tokens share the pages of these; None: if the
    allocation lets them. allocation: which pages a request gets, a name in `ALLOCATIONS` or a class of your own as
    `Allocation` describes it. eviction: what makes an `Eviction`, by which cached pages go. swap_space: GiB of host
    memory for the pages of preempted requests, which then need not be computed again; 0 for none. preemption_mode:
    "recompute" or "swap", the latter as long as there is room; None for what is estimated to be faster, request by
    request. batch_invariant: a seeded request's tokens and log-probabilities do not depend on what runs beside it, nor
    on preemption, chunks or cached prefixes, bit for bit. All steps have one shape then, max_num_batched_tokens, where
    prompts attend token by token: slower where few run or prompts are long. None for a size or for fuse_projections:
    the platform's default.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_bytes: int = 1 << 30
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_mixed_tokens: int | None = None
    attention_impl: str = "auto"
    fuse_projections: bool | None = None
    lookahead: int = 1
    decode_steps: int | None = None
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    compilation_cache_dir: str | None = None
    enable_prefix_caching: bool | None = None
    allocation: str | type[Allocation] = "paged"
    eviction: Callable[[], Eviction] = LeastRecentlyUsed
    swap_space: float = 0
    preemption_mode: str | None = None
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        _accept(isinstance(self.model, str) and bool(self.model), "model", self.model, "a path or a hub id")
        _accept(self.load_format in LOAD_FORMATS, "load_format", self.load_format, ", ".join(LOAD_FORMATS))
        _accept(self.dtype in DTYPES, "dtype", self.dtype, ", ".join(DTYPES))
        _accept(
            self.logprobs_mode in LOGPROBS_MODES,
            "logprobs_mode",
            self.logprobs_mode,
            ", ".join(LOGPROBS_MODES),
        )
        folder = self.compilation_cache_dir
        _accept(folder is None or bool(folder), "compilation_cache_dir", folder, "a folder, or None")
        named = isinstance(self.allocation, str) and self.allocation in ALLOCATIONS
        ok = named or (isinstance(self.allocation, type) and hasattr(self.allocation, "shares"))
        _accept(ok, "allocation", self.allocation, ", ".join(ALLOCATIONS) + ", or a class like these")
        _accept(callable(self.eviction), "eviction", self.eviction, "a class like LeastRecentlyUsed")
        caching = self.enable_prefix_caching
        _accept(caching is None or isinstance(caching, bool), "enable_prefix_caching", caching, "True, False or None")
        ok, accepted = not caching or self.allocation_class.shares, f"False or None with allocation={self.allocation!r}"
        _accept(ok, "enable_prefix_caching", caching, accepted)
        _accept(_is_int(self.seed), "seed", self.seed, "an integer")
        for name in ("max_model_len", "page_size", "num_pages", "decode_steps", *SIZES):
            value, optional = getattr(self, name), name != "page_size"
            low = 2 if name == "num_pages" else 1
            ok = (optional and value is None) or (_is_int(value) and value >= low)
            _accept(ok, name, value, f"an integer >= {low}" + (", or None" if optional else ""))
        ok = isinstance(self.gpu_memory_utilization, int | float) and 0 < self.gpu_memory_utilization <= 1
        _accept(ok, "gpu_memory_utilization", self.gpu_memory_utilization, "a number in (0, 1]")
        ok = _is_int(self.cpu_kv_cache_bytes) and self.cpu_kv_cache_bytes > 0
        _accept(ok, "cpu_kv_cache_bytes", self.cpu_kv_cache_bytes, "an integer > 0")
        _accept(_is_int(self.lookahead) and 0 <= self.lookahead <= 8, "lookahead", self.lookahead, "0 to 8")
        _accept(_is_int(self.max_logprobs) and self.max_logprobs >= -1, "max_logprobs", self.max_logprobs, ">= -1")
        ok, accepted = (self.decode_steps or 1) <= self.page_size, f"at most page_size={self.page_size}"
        _accept(ok, "decode_steps", self.decode_steps, accepted)
        self._check_swapping()
        self._check_invariant()
        if self.max_num_seqs and self.max_num_batched_tokens:
            ok = self.max_num_batched_tokens >= self.max_num_seqs
            accepted = f"at least max_num_seqs={self.max_num_seqs}"
            _accept(ok, "max_num_batched_tokens", self.max_num_batched_tokens, accepted)

    def _check_swapping(self) -> None:
        space, mode = self.swap_space, self.preemption_mode
        ok = isinstance(space, int | float) and not isinstance(space, bool) and space >= 0
        _accept(ok, "swap_space", space, "GiB, a number >= 0")
        modes = PREEMPTION_MODES if space else PREEMPTION_MODES[:1]
        accepted = f"{', '.join(modes)}, or None" + ("" if space else "; swapping needs swap_space")
        _accept(mode is None or mode in modes, "preemption_mode", mode, accepted)

    def _check_invariant(self) -> None:
        invariant = self.batch_invariant
        _accept(isinstance(invariant, bool), "batch_invariant", invariant, "True or False")
        ok = not invariant or self.decode_steps in (None, 1)
        _accept(ok, "decode_steps", self.decode_steps, "1 or None with batch_invariant=True")
        ok = not invariant or (self.max_num_seqs or 1) <= SAMPLE_ROWS or not (self.max_num_seqs or 0) % SAMPLE_ROWS
        accepted = f"up to {SAMPLE_ROWS}, or a multiple of it, with batch_invariant=True"
        _accept(ok, "max_num_seqs", self.max_num_seqs, accepted)

    def resolve(self, platform: str, max_model_len: int, num_pages: int, model_bytes: int = 0) -> "ResolvedConfig":
        """Fills in the platform's defaults, and what model and memory decide."""
        defaults = platform_defaults(platform)
        seqs, tokens = defaults.max_num_seqs, defaults.max_num_batched_tokens
        if self.batch_invariant:
            seqs = tokens = min(seqs, SAMPLE_ROWS)
        steps = 1 if self.batch_invariant else min(defaults.decode_steps, self.page_size)
        max_num_seqs = self.max_num_seqs or min(seqs, self.max_num_batched_tokens or seqs)
        budget = self.max_num_batched_tokens or max(tokens, max_num_seqs)
        values = {field.name: getattr(self, field.name) for field in fields(EngineConfig)} | {
            "max_model_len": max_model_len,
            "num_pages": num_pages,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": budget,
            "max_mixed_tokens": min(self.max_mixed_tokens or defaults.max_mixed_tokens, budget),
            "fuse_projections": self.fuse(platform),
            "decode_steps": self.decode_steps or (steps if model_bytes <= SMALL_MODEL else 1),
            "enable_prefix_caching": self.enable_prefix_caching is not False and self.allocation_class.shares,
        }
        return ResolvedConfig(**values)

    @property
    def allocation_class(self) -> type[Allocation]:
        return ALLOCATIONS[self.allocation] if isinstance(self.allocation, str) else self.allocation

    @property
    def swaps(self) -> bool:
        """Whether preempted requests may be swapped."""
        return self.swap_space > 0 and self.preemption_mode != "recompute"

    def fuse(self, platform: str) -> bool:
        """Whether QKV and gate-up are one product each."""
        default = platform_defaults(platform).fuse_projections
        return default if self.fuse_projections is None else self.fuse_projections

    def resolve_dtype(self, platform: str, checkpoint_dtype: str | None) -> str:
        """The dtype of weights, activations and KV cache."""
        if self.dtype != "auto":
            return self.dtype
        if platform == "cpu":
            return "float32"
        return checkpoint_dtype if checkpoint_dtype in ("bfloat16", "float16") else "bfloat16"


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig with every size known."""

    max_model_len: int  # pyright: ignore[reportGeneralTypeIssues] (no default any more)
    num_pages: int  # pyright: ignore[reportGeneralTypeIssues] (no default any more)
    max_num_seqs: int  # pyright: ignore[reportGeneralTypeIssues] (no default any more)
    max_num_batched_tokens: int  # pyright: ignore[reportGeneralTypeIssues] (no default any more)
    max_mixed_tokens: int  # pyright: ignore[reportGeneralTypeIssues] (no default any more)
    fuse_projections: bool  # pyright: ignore[reportGeneralTypeIssues] (no default any more)
    decode_steps: int  # pyright: ignore[reportGeneralTypeIssues] (no default any more)
    enable_prefix_caching: bool  # pyright: ignore[reportGeneralTypeIssues] (no default any more)

    @property
    def logprob_rows(self) -> int:
        """Prompt positions whose logits exist at one time; as many as the sampler has, if bits must be the same."""
        return self.max_num_seqs if self.batch_invariant else PROMPT_LOGPROB_ROWS

    @property
    def pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)


def platform_defaults(platform: str) -> PlatformDefaults:
    """A platform's; the GPU's for one that is not in the table."""
    return PLATFORM_DEFAULTS.get(platform, PLATFORM_DEFAULTS["gpu"])


def memory_fraction() -> float:
    """The share of device memory that JAX takes for itself when its backend starts."""
    for name in MEMORY_FRACTION_VARIABLES:
        if name in os.environ:
            return float(os.environ[name])
    return DEFAULT_MEMORY_FRACTION


def request_memory_fraction(share: float) -> None:
    """Asks JAX for `share` of the device's memory. Works only before its backend starts; a user's own setting stays."""
    if not any(name in os.environ for name in MEMORY_FRACTION_VARIABLES):
        os.environ[MEMORY_FRACTION_VARIABLE] = str(share)


def xla_flags() -> str:
    """What the user has set of XLA's flags."""
    return os.environ.get("XLA_FLAGS", "")


def quiet_transformers() -> None:
    """Keeps transformers from advising, when imported, to install torch, which nothing here needs."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _accept(ok: bool, name: str, value: Any, accepted: str) -> None:
    if not ok or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{name}={value!r}; accepted: {accepted}")
