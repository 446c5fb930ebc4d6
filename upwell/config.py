"""ModelConfig: V4's geometry, read from a config.json in either spelling.

The official spelling has `compress_ratios` (0 sliding, 4 CSA, 128 HCA; one entry more than layers, the last for MTP),
`num_hash_layers`, `qk_rope_head_dim`, `rope_scaling`; transformers' has `layer_types`, `mlp_layer_types`,
`compress_rates`, `partial_rotary_factor` and nested `rope_parameters`. Both become the same frozen value.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from upwell.errors import ConfigError

Numerics = Literal["exact", "official"]

PRESETS = ("v4-flash", "v4-pro")
BLOCK_TOKENS = 256  # tokens a cache block holds: a multiple of both compression ratios (DESIGN.md, decision 4)

_RATIO_OF_LAYER_TYPE = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}


@dataclass(frozen=True)
class Yarn:
    """YaRN on the compressed layers' rotary (paper: factor 16 over 65,536 positions; no mscale in V4)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Geometry of a V4 model. Names are those of the official config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    compress_ratios: tuple[int, ...]  # one a layer: 0 sliding, csa_ratio CSA, hca_ratio HCA
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    n_shared_experts: int = 1
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: Yarn | None = None
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    csa_ratio: int = 4
    hca_ratio: int = 128
    bos_token_id: int = 0
    eos_token_id: int = 1
    expert_dtype: str | None = None  # "fp4" in the official quantized releases
    quant_method: str | None = None  # "fp8" in the official releases; None for BF16/FP32

    @property
    def nope_head_dim(self) -> int:
        return self.head_dim - self.qk_rope_head_dim

    def is_hash_layer(self, layer: int) -> bool:
        return layer < self.num_hash_layers

    def __post_init__(self) -> None:
        if len(self.compress_ratios) != self.num_hidden_layers:
            raise ConfigError(
                f"config: compress_ratios has {len(self.compress_ratios)} entries for {self.num_hidden_layers} layers"
            )
        for ratio in self.compress_ratios:
            if ratio not in (0, self.csa_ratio, self.hca_ratio):
                raise ConfigError(
                    f"config: compress ratio {ratio} is none of 0 (sliding), {self.csa_ratio} (CSA), "
                    f"{self.hca_ratio} (HCA)"
                )
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
                     "q_lora_rank", "o_lora_rank", "o_groups", "sliding_window", "n_routed_experts",
                     "num_experts_per_tok", "moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config: {name} is {getattr(self, name)}, must be at least 1")
        if self.num_attention_heads % self.o_groups:
            raise ConfigError(
                f"config: num_attention_heads {self.num_attention_heads} isn't a multiple of o_groups {self.o_groups}"
            )
        if not 0 < self.qk_rope_head_dim <= min(self.head_dim, self.index_head_dim) or self.qk_rope_head_dim % 2:
            raise ConfigError(f"config: qk_rope_head_dim {self.qk_rope_head_dim} doesn't fit the head dims")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"config: num_experts_per_tok {self.num_experts_per_tok} exceeds "
                f"n_routed_experts {self.n_routed_experts}"
            )
        for ratio in (self.csa_ratio, self.hca_ratio):
            if BLOCK_TOKENS % ratio:
                raise ConfigError(f"config: compression ratio {ratio} doesn't divide the cache block {BLOCK_TOKENS}")

    def with_mtp(self, layers: int) -> ModelConfig:
        return replace(self, num_nextn_predict_layers=layers)

    @staticmethod
    def from_dict(raw: dict[str, Any], origin: str = "config") -> ModelConfig:
        """Read a parsed config.json in either spelling; `origin` names it in errors. Raises ConfigError."""
        model_type = raw.get("model_type")
        if model_type != "deepseek_v4":
            raise ConfigError(
                f"{origin}: model_type is {model_type!r}, not 'deepseek_v4'",
                "Upwell runs DeepSeek V4 checkpoints only",
            )
        try:
            return _read(raw, origin)
        except KeyError as missing:
            raise ConfigError(f"{origin}: {missing.args[0]!r} is missing") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{origin}: {error}") from None

    @staticmethod
    def from_file(path: Path) -> ModelConfig:
        """Read `path` (a config.json). Raises ConfigError naming the file."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file", "a checkpoint directory holds a config.json") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: can't be read as JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: holds a {type(raw).__name__}, not an object")
        return ModelConfig.from_dict(raw, str(path))

    @staticmethod
    def preset(name: str) -> ModelConfig:
        """The true geometry of a published model: 'v4-flash' or 'v4-pro'."""
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}", f"presets: {', '.join(PRESETS)}")
        text = resources.files("upwell").joinpath("presets", f"{name}.json").read_text(encoding="utf-8")
        return ModelConfig.from_dict(json.loads(text), f"preset {name}")

    def to_official(self) -> dict[str, Any]:
        """The config.json of the official spelling; `from_dict(to_official()) == self`."""
        raw: dict[str, Any] = {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "hidden_act": "silu",
            "norm_topk_prob": True,
            "num_key_value_heads": 1,
            "scoring_func": "sqrtsoftplus",
            "tie_word_embeddings": False,
            "topk_method": "noaux_tc",
            "compress_ratios": [*self.compress_ratios, *([0] * self.num_nextn_predict_layers)],
        }
        for name in _PLAIN_FIELDS:
            raw[name] = getattr(self, name)
        if self.yarn is not None:
            raw["rope_scaling"] = {
                "type": "yarn",
                "factor": self.yarn.factor,
                "original_max_position_embeddings": self.yarn.original_max_position_embeddings,
                "beta_fast": self.yarn.beta_fast,
                "beta_slow": self.yarn.beta_slow,
            }
        if (self.csa_ratio, self.hca_ratio) != (4, 128):
            raw["compress_rate_csa"], raw["compress_rate_hca"] = self.csa_ratio, self.hca_ratio
        if self.expert_dtype is not None:
            raw["expert_dtype"] = self.expert_dtype
        if self.quant_method is not None:
            raw["quantization_config"] = {
                "quant_method": self.quant_method,
                "fmt": "e4m3",
                "scale_fmt": "ue8m0",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
            }
        return raw


_PLAIN_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_lora_rank", "o_groups", "sliding_window", "index_n_heads", "index_head_dim", "index_topk",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "num_hash_layers",
    "routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "rope_theta",
    "compress_rope_theta", "max_position_embeddings", "num_nextn_predict_layers", "bos_token_id", "eos_token_id",
)  # fmt: skip


def _read(raw: dict[str, Any], origin: str) -> ModelConfig:
    layers = int(raw["num_hidden_layers"])
    rates = raw.get("compress_rates") or {}
    csa = int(rates.get("compressed_sparse_attention", raw.get("compress_rate_csa", 4)))
    hca = int(rates.get("heavily_compressed_attention", raw.get("compress_rate_hca", 128)))
    unsupported = {
        "scoring_func": "sqrtsoftplus", "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "num_key_value_heads": 1, "norm_topk_prob": True,
    }  # fmt: skip
    for key, only in unsupported.items():
        if raw.get(key, only) != only:
            raise ConfigError(f"{origin}: {key} is {raw[key]!r}; V4 has {only!r}")
    eos = raw.get("eos_token_id", 1)
    quantization = raw.get("quantization_config") or {}
    return ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        num_hidden_layers=layers,
        compress_ratios=_ratios(raw, layers, csa, hca, origin),
        num_attention_heads=int(raw["num_attention_heads"]),
        head_dim=int(raw["head_dim"]),
        qk_rope_head_dim=_rope_dim(raw),
        q_lora_rank=int(raw["q_lora_rank"]),
        o_lora_rank=int(raw["o_lora_rank"]),
        o_groups=int(raw["o_groups"]),
        sliding_window=int(raw["sliding_window"]),
        index_n_heads=int(raw["index_n_heads"]),
        index_head_dim=int(raw["index_head_dim"]),
        index_topk=int(raw["index_topk"]),
        n_routed_experts=int(raw["n_routed_experts"]),
        num_experts_per_tok=int(raw["num_experts_per_tok"]),
        moe_intermediate_size=int(raw["moe_intermediate_size"]),
        num_hash_layers=_hash_layers(raw, origin),
        routed_scaling_factor=float(raw["routed_scaling_factor"]),
        swiglu_limit=float(raw["swiglu_limit"]),
        n_shared_experts=int(raw.get("n_shared_experts", 1)),
        hc_mult=int(raw.get("hc_mult", 4)),
        hc_sinkhorn_iters=int(raw.get("hc_sinkhorn_iters", 20)),
        hc_eps=float(raw.get("hc_eps", 1e-6)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(_rope(raw, "main").get("rope_theta", raw.get("rope_theta", 10000.0))),
        compress_rope_theta=float(
            _rope(raw, "compress").get("rope_theta", raw.get("compress_rope_theta", 160000.0))
        ),
        yarn=_yarn(raw, origin),
        max_position_embeddings=int(raw.get("max_position_embeddings", 1048576)),
        num_nextn_predict_layers=int(raw.get("num_nextn_predict_layers") or 0),
        csa_ratio=csa,
        hca_ratio=hca,
        bos_token_id=int(raw["bos_token_id"] if raw.get("bos_token_id") is not None else 0),
        eos_token_id=int(eos[0] if isinstance(eos, list) else 1 if eos is None else eos),
        expert_dtype=raw.get("expert_dtype") or quantization.get("expert_dtype"),
        quant_method=quantization.get("quant_method"),
    )


def _ratios(raw: dict[str, Any], layers: int, csa: int, hca: int, origin: str) -> tuple[int, ...]:
    by_kind = {"sliding": 0, "csa": csa, "hca": hca}
    types = raw.get("layer_types")
    if types is not None:
        unknown = [t for t in types if t not in _RATIO_OF_LAYER_TYPE]
        if unknown:
            raise ConfigError(f"{origin}: layer type {unknown[0]!r} is none of {', '.join(_RATIO_OF_LAYER_TYPE)}")
        return tuple(by_kind[_RATIO_OF_LAYER_TYPE[t]] for t in types)
    # The official list has one entry more, for the MTP block.
    return tuple(int(r) for r in raw["compress_ratios"][:layers])


def _hash_layers(raw: dict[str, Any], origin: str) -> int:
    types = raw.get("mlp_layer_types")
    if types is None:
        return int(raw["num_hash_layers"])
    count = sum(t == "hash_moe" for t in types)
    if any(t != "hash_moe" for t in types[:count]):
        raise ConfigError(f"{origin}: mlp_layer_types has hash layers after learned ones")
    return count


def _rope(raw: dict[str, Any], label: str) -> dict[str, Any]:
    nested = (raw.get("rope_parameters") or {}).get(label)
    return nested if isinstance(nested, dict) else {}


def _rope_dim(raw: dict[str, Any]) -> int:
    if raw.get("qk_rope_head_dim") is not None:
        return int(raw["qk_rope_head_dim"])
    factor = raw.get("partial_rotary_factor") or _rope(raw, "main").get("partial_rotary_factor")
    return int(raw["head_dim"] * factor) if factor else 64


def _yarn(raw: dict[str, Any], origin: str) -> Yarn | None:
    scaling = _rope(raw, "compress") or raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"{origin}: rope type {kind!r} isn't V4's; expected 'yarn' or 'default'")
    return Yarn(
        factor=float(scaling["factor"]),
        original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast", 32)),
        beta_slow=float(scaling.get("beta_slow", 1)),
    )
