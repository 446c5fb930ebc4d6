"""A V4 of a few hundred thousand parameters with every part, a byte tokenizer, and transformers' twin of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from upwell.chat import protocol
from upwell.checkpoint import save_checkpoint
from upwell.config import ModelConfig
from upwell.engine import LLM, Tokenizer
from upwell.model import Transformer

VOCAB = 300
EOS = 1
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 96, "moe_intermediate_size": 40, "num_hidden_layers": 6,
    "num_attention_heads": 6, "head_dim": 48, "q_lora_rank": 56, "num_experts_per_tok": 3, "n_routed_experts": 10,
    "o_groups": 3, "o_lora_rank": 24, "index_n_heads": 5, "index_head_dim": 40, "index_topk": 16,
    "sliding_window": 128, "num_hash_layers": 2, "qk_rope_head_dim": 16, "compress_ratios": [0, 4, 128, 4, 128, 4],
}  # fmt: skip


@torch.no_grad()
def _fill(named: Any, buffers: Any, seed: int) -> None:
    """Weights at a scale where logits and index scores differ clearly: no near-ties."""
    generator = torch.Generator().manual_seed(seed)
    experts, k = SIZES["n_routed_experts"], SIZES["num_experts_per_tok"]
    for name, tensor in named:
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.1 * noise)
        else:
            tensor.copy_(noise * (0.15 * (64 / tensor.shape[-1]) ** 0.5 if tensor.dim() > 1 else 0.5))
    for name, tensor in buffers:
        if name.endswith("tid2eid"):
            rows = [torch.randperm(experts, generator=generator)[:k] for _ in range(VOCAB)]
            tensor.copy_(torch.stack(rows))


def config() -> ModelConfig:
    return ModelConfig.from_dict(
        {
            **SIZES, "model_type": "deepseek_v4", "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
            "num_nextn_predict_layers": 0, "max_position_embeddings": 8192,
        }
    )  # fmt: skip


def build_model(seed: int = 0) -> Transformer:
    model = Transformer(config()).eval()
    _fill(model.named_parameters(), model.named_buffers(), seed)
    return model


def build_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, then V4's special tokens; ids 0 and 1 are begin and end of sentence."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {protocol.BOS: 0, protocol.EOS: 1} | {char: k + 2 for k, char in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    special = [protocol.BOS, protocol.EOS, protocol.USER, protocol.ASSISTANT, protocol.THINK, protocol.END_THINK]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    return tokenizer


def build_llm(seed: int = 0, **options: Any) -> LLM:
    return LLM.from_model(build_model(seed), Tokenizer(build_tokenizer()), **options)


def save(directory: Path, seed: int = 0, with_tokenizer: bool = True) -> Path:
    """The model as a checkpoint directory in FP32."""
    save_checkpoint(build_model(seed), directory, quantize=False)
    if with_tokenizer:
        build_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def save_transformers(directory: Path, seed: int = 0) -> Any:
    """transformers' model with weights of its own, saved by it; returns it."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    yarn = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
    hf_config = DeepseekV4Config(**SIZES, rope_scaling=yarn)
    hf_config._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(hf_config).eval()
    _fill(model.named_parameters(), model.named_buffers(), seed)
    model.save_pretrained(directory)
    return model
