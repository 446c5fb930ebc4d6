"""Runs a small V4 on the test device (npu_device), its experts on the host, and prints what test_offload.py asserts.

A process of its own: the device is the process's.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import npu_run  # installs the device, isort: skip
import torch

# npu_run turns the kernels off, for its comparison of plain paths; here the host is to compute with them.
os.environ.pop("UPWELL_KERNELS")

from upwell import LLM
from upwell.checkpoint import save_checkpoint


def tokens(llm: LLM) -> list[list[int]]:
    prompts = [{"prompt_token_ids": npu_run.ids(n)} for n in npu_run.LENGTHS]
    return [o.token_ids for o in llm.generate(prompts, npu_run.GREEDY)]


def main() -> None:
    out: dict[str, Any] = {}
    for kind in ("packed", "dense"):
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(npu_run.build(), folder, quantize=kind == "packed")
            common: dict[str, Any] = {"dtype": torch.float32, "max_num_seqs": 4, "cache_tokens": 1024}
            out[kind, "cpu"] = tokens(LLM(folder, device="cpu", **common))
            host = LLM(folder, device="npu", offload="experts=host", **common)
            out[kind, "host"] = tokens(host)
            away = host.model.layers[1].ffn.experts.away
            held = away.experts.packed[2]["w1"][0] if kind == "packed" else away.experts.w13
            out[kind, "devices"] = [host.model.layers[1].attn.wq_a.weight.device.type, held.device.type]
            out[kind, "kernels"] = away._kernels is not None
            names = [name for name, _ in host.model.named_parameters()] + [n for n, _ in host.model.named_buffers()]
            out[kind, "left"] = [n for n in names if ".ffn.experts." in n and host.model.get_parameter(n).numel()]
            if kind == "packed":
                disk = LLM(folder, device="npu", offload="experts=disk", expert_memory="200KiB", **common)
                out[kind, "disk"] = tokens(disk)
                out[kind, "slots"] = disk.model.pages.slots
    json.dump({" ".join(key): value for key, value in out.items()}, sys.stdout)


if __name__ == "__main__":
    main()
