"""What a LLaMA is: the sizes and switches of a checkpoint, read from its Hugging Face configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "freq_factors")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv 2104.09864) and how its frequencies are stretched for long contexts.

    `freq_factors` are GGUF's explicit divisors, one per frequency; they replace the parameters of `llama3`.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    freq_factors: tuple[float, ...] = ()

    @staticmethod
    def from_hf(config: Mapping[str, Any], max_position_embeddings: int) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type={rope_type!r} is not supported; accepted: {', '.join(ROPE_TYPES)}")
        required = {"linear": ("factor",), "dynamic": ("factor",), "freq_factors": ("freq_factors",)}
        required["llama3"] = (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
        for key in required.get(rope_type, ()):
            if rope.get(key) is None:
                raise ValueError(f"rope_type={rope_type!r} needs {key!r}, which the configuration lacks: {rope}")
        return RopeConfig(
            rope_type=rope_type,
            theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            factor=float(rope.get("factor") or 1.0),
            low_freq_factor=float(rope.get("low_freq_factor") or 1.0),
            high_freq_factor=float(rope.get("high_freq_factor") or 1.0),
            original_max_position_embeddings=int(
                rope.get("original_max_position_embeddings") or max_position_embeddings
            ),
            freq_factors=tuple(float(x) for x in rope.get("freq_factors") or ()),
        )


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of one `LlamaForCausalLM` checkpoint.

    `dtype` is the checkpoint's own dtype, if it names one; `eos_token_ids` are those of its configuration
    (`generation_config.json` may name more: `models.load` merges them).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_q_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even one")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not supported; accepted: {', '.join(ACTIVATIONS)}")
        if self.rope.freq_factors and len(self.rope.freq_factors) != self.head_dim // 2:
            raise ValueError(f"freq_factors has {len(self.rope.freq_factors)} entries, not {self.head_dim // 2}")

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the dict of a `config.json`. Raises ValueError, naming the field, on what is not a LLaMA."""
        architectures = config.get("architectures") or ["LlamaForCausalLM"]
        if "LlamaForCausalLM" not in architectures:
            raise ValueError(f"architectures={architectures} is not supported; accepted: LlamaForCausalLM")
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            if not isinstance(config.get(key), int) or config[key] < 1:
                raise ValueError(f"{key}={config.get(key)!r} in the model's configuration; expected a positive integer")
        heads = config["num_attention_heads"]
        max_position_embeddings = int(config.get("max_position_embeddings") or 2048)
        return LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_q_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_hf(config, max_position_embeddings),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            hidden_act=config.get("hidden_act") or "silu",
            initializer_range=float(config.get("initializer_range") or 0.02),
            dtype=config.get("dtype") or config.get("torch_dtype"),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=token_ids(config.get("eos_token_id")),
        )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The end-of-sequence field of a configuration, which may be absent, one id or a list of them."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
