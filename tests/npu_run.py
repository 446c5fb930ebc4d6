"""Runs a small V4 on the test device (npu_device) and on the CPU and prints what test_npu.py asserts, as JSON.

A process of its own: the device is the process's, and the CPU side has to take the plain path too.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

os.environ["UPWELL_KERNELS"] = "off"

import npu_device  # isort: skip

npu_device.install()

import torch  # noqa: E402
from tiny_v4 import SIZES, _fill  # noqa: E402

from upwell import LLM, SamplingParams, load_model  # noqa: E402
from upwell.checkpoint import save_checkpoint  # noqa: E402
from upwell.config import ModelConfig  # noqa: E402
from upwell.devices import resolve_device  # noqa: E402
from upwell.devices.operators import OperatorRecord  # noqa: E402
from upwell.model import Transformer  # noqa: E402
from upwell.ops.linear import dense_weight  # noqa: E402

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
DRAWN = SamplingParams(
    temperature=0.9, seed=3, top_p=0.95, top_k=60, min_p=0.001, max_tokens=3, ignore_eos=True, logprobs=2,
    repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, logit_bias={5: 1.0}, min_tokens=2,
)  # fmt: skip
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)
# A batch of three fills a bucket of four; 126 tokens complete an HCA entry while decoding, and have more CSA entries
# than the indexer keeps.
LENGTHS = (126, 40, 3)


def build(numerics: Any = "exact") -> Transformer:
    """Each attention kind, both routings, one MTP block; few Sinkhorn iterations, for time."""
    config = ModelConfig.from_dict(
        {
            **SIZES, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "num_hash_layers": 1, "index_topk": 6,
            "index_head_dim": 32, "moe_intermediate_size": 64,
            "sliding_window": 32, "hc_sinkhorn_iters": 2, "model_type": "deepseek_v4", "routed_scaling_factor": 1.5,
            "swiglu_limit": 10.0, "num_nextn_predict_layers": 1, "max_position_embeddings": 2048,
        }
    )  # fmt: skip
    model = Transformer(config, numerics).eval()
    _fill(model.named_parameters(), model.named_buffers(), 0)
    return model


def ids(length: int) -> list[int]:
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def engine(model: Transformer, **options: Any) -> LLM:
    return LLM.from_model(model, None, max_num_seqs=4, cache_tokens=1024, **options)


def tokens(llm: LLM, lengths: tuple[int, ...], params: SamplingParams) -> list[list[int]]:
    return [o.token_ids for o in llm.generate([{"prompt_token_ids": ids(n)} for n in lengths], params)]


def draft(model: Transformer) -> torch.Tensor:
    """The MTP block's logits after 20 tokens, without a cache."""
    on = model.device
    with torch.no_grad():
        streams = model.streams(torch.tensor([ids(20)], device=on))
        return model.draft(torch.tensor([ids(21)[1:]], device=on), streams)[0].cpu()


def decoded_error() -> float:
    """An official FP8/FP4 checkpoint on a chip without these types: its weights against the packed ones' values."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(build(), folder, quantize=True)
        packed, dense = (load_model(folder, dtype=torch.float32, device=d) for d in ("cpu", "npu:0"))
    mlp, other = packed.layers[1].ffn.experts, dense.layers[1].ffn.experts
    w1, s1 = mlp.packed[2]["w1"]
    pairs = [
        (packed.layers[0].attn.wq_b.dense(torch.float32), dense.layers[0].attn.wq_b.weight),
        (dense_weight(w1, s1, torch.float32), other.w13[2, : w1.shape[0]]),
    ]
    assert dense.layers[0].attn.wq_b.scale is None and other.packed is None
    return max(float((a - b.cpu()).abs().max()) for a, b in pairs)


def main() -> None:
    out: dict[str, Any] = {"auto": str(resolve_device("auto")), "named": str(resolve_device("npu:0"))}
    host, card = engine(build()), engine(build().to("npu"))
    with torch.no_grad(), OperatorRecord() as record:
        npu_device.waits.clear()
        out["card"] = [tokens(card, LENGTHS, GREEDY)]
        out["waits"] = dict(npu_device.waits)
        out["card"].append(tokens(card, (9,), DRAWN))
        card_draft = draft(card.model)
    out["host"] = [tokens(host, LENGTHS, GREEDY), tokens(host, (9,), DRAWN)]
    out["draft_error"] = float((card_draft - draft(host.model)).abs().max())

    captured = engine(build().to("npu"), graphs=True)
    npu_device.waits.clear()
    out["captured"] = tokens(captured, LENGTHS, GREEDY)
    out["captured_waits"] = dict(npu_device.waits)
    out["replays"] = [g.replays for g in npu_device.graphs]

    with torch.no_grad():
        out["decoded_error"] = decoded_error()
    with torch.no_grad(), record:
        tokens(engine(build().to("npu", torch.bfloat16)), (9,), SHORT)
        tokens(engine(build("official").to("npu")), (9,), SHORT)
    out["used"] = sorted([name, sorted(dtypes)] for name, dtypes in record.used)
    try:
        torch.ones(2, device="npu") + torch.ones(2)
        out["mixed"] = "no error"
    except RuntimeError as error:
        out["mixed"] = str(error)
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
