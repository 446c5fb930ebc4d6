"""Upwell against llama.cpp on the same V4 weights: prefill and decode at batch 1, same threads, on a CPU.

    python benchmarks/vs_llama_cpp.py [--kind bf16|fp4] [--llama-python PATH] [--json OUT]

The model is that of vs_transformers.py, its matrices rounded to BF16; kind fp4 also rounds the routed experts to FP4,
which GGUF calls MXFP4: both sides then hold the same values. This script writes the GGUF (package `gguf`), and runs
llama.cpp through llama-cpp-python >= 0.3.36 in the interpreter --llama-python, as a child that is asked in turn with
our side. llama.cpp rounds activations (to BF16, or to 8 bits in front of FP4), so logits agree roughly: reported, and
the run stops where they don't correlate. Nothing is written but OUT and a temporary file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
PREFILL, STEPS, CONTEXT = 512, 32, 2048


# ---- llama.cpp's side: a child process, without torch ----


def serve(path: str, threads: int) -> None:
    """Answers lines of JSON on stdin: {"do": "logits"|"prefill"|"decode", ...}."""
    import llama_cpp as api
    import numpy as np

    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        raise SystemExit("llama.cpp can't load the model")
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, PREFILL, PREFILL
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp can't make a context")
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def decode(ids: list[int]) -> None:
        batch = api.llama_batch_get_one((api.llama_token * len(ids))(*ids), len(ids))
        if api.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def last_logits() -> Any:
        return np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), shape=(vocab,))

    def clear() -> None:
        api.llama_memory_clear(api.llama_get_memory(context), True)

    print(json.dumps({"version": api.__version__}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["do"] == "logits":  # after each of the tokens, one at a time
            clear()
            rows = []
            for token in ask["ids"]:
                decode([token])
                rows.append(last_logits().tolist())
            answer: Any = rows
        elif ask["do"] == "prefill":
            clear()
            begin = time.perf_counter()
            decode(ask["ids"])
            last_logits()
            answer = time.perf_counter() - begin
        else:
            token, times = int(last_logits().argmax()), []
            for _ in range(ask["steps"]):
                begin = time.perf_counter()
                decode([token])
                token = int(last_logits().argmax())
                times.append(time.perf_counter() - begin)
            answer = statistics.median(times)
        print(json.dumps(answer), flush=True)


class Theirs:
    def __init__(self, python: str, path: Path, threads: int) -> None:
        command = [python, __file__, "--serve", str(path), "--threads", str(threads)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._read()["version"]

    def ask(self, **what: Any) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(what) + "\n")
        self.child.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp's process ended with code {self.child.wait()}")
        return json.loads(line)


# ---- our side ----

NAMES = {  # official name in a layer -> GGUF
    "hc_attn_fn": "hc_attn_fn", "hc_attn_base": "hc_attn_base", "hc_attn_scale": "hc_attn_scale",
    "hc_ffn_fn": "hc_ffn_fn", "hc_ffn_base": "hc_ffn_base", "hc_ffn_scale": "hc_ffn_scale",
    "attn.attn_sink": "attn_sinks", "attn.wq_a.weight": "attn_q_a", "attn.wq_b.weight": "attn_q_b",
    "attn.q_norm.weight": "attn_q_a_norm", "attn.wkv.weight": "attn_kv", "attn.kv_norm.weight": "attn_kv_a_norm",
    "attn.wo_a.weight": "attn_output_a", "attn.wo_b.weight": "attn_output_b",
    "attn.compressor.ape": "attn_compressor_ape", "attn.compressor.wkv.weight": "attn_compressor_kv",
    "attn.compressor.wgate.weight": "attn_compressor_gate", "attn.compressor.norm.weight": "attn_compressor_norm",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b", "attn.indexer.weights_proj.weight": "indexer.proj",
    "attn.indexer.compressor.ape": "indexer_compressor_ape",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm",
    "attn_norm.weight": "attn_norm", "ffn_norm.weight": "ffn_norm", "ffn.gate.weight": "ffn_gate_inp",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid", "ffn.shared_experts.w1.weight": "ffn_gate_shexp",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp", "ffn.shared_experts.w3.weight": "ffn_up_shexp",
}  # fmt: skip
TOP = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight",
       "hc_head_fn": "output_hc_fn.weight", "hc_head_base": "output_hc_base.weight",
       "hc_head_scale": "output_hc_scale.weight"}  # fmt: skip


def build(kind: str) -> Any:
    """The model: matrices of BF16 values; kind fp4: routed experts packed."""
    import torch
    from torch import nn
    from vs_transformers import GEOMETRY

    from upwell.config import ModelConfig
    from upwell.formats.fp4 import quantize_fp4
    from upwell.model import Transformer
    from upwell.model.layers import Linear

    config = ModelConfig.from_dict({**GEOMETRY, "model_type": "deepseek_v4"}).with_mtp(0)
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
                continue
            parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3))
            if parameter.dim() > 1 and not name.endswith((".fn", ".ape")):
                parameter.copy_(parameter.bfloat16())
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                order = torch.rand(buffer.shape[0], config.n_routed_experts, generator=generator).argsort(1)
                buffer.copy_(order[:, : buffer.shape[1]])
        for module in model.modules():
            if isinstance(module, Linear):
                module.weight = nn.Parameter(module.weight.detach().bfloat16(), False)
        for block in model.layers:
            experts = block.ffn.experts
            inter = config.moe_intermediate_size
            if kind == "fp4":
                experts.pack([
                    {"w1": quantize_fp4(a[:inter]), "w3": quantize_fp4(a[inter:]), "w2": quantize_fp4(b)}
                    for a, b in zip(experts.w13.detach(), experts.w2.detach(), strict=True)
                ])  # fmt: skip
            else:
                experts.w13 = nn.Parameter(experts.w13.detach().bfloat16(), False)
                experts.w2 = nn.Parameter(experts.w2.detach().bfloat16(), False)
    return model


def mxfp4(weight: Any, scale: Any) -> Any:
    """Our FP4 [rows, cols/2] as GGUF's blocks [rows, cols/32 * 17]: a scale byte, then 16 bytes whose low nibbles are
    the group's first half and whose high nibbles are its second."""
    import torch

    rows = weight.shape[0]
    codes = torch.stack((weight & 15, weight >> 4), -1).view(rows, -1, 32)
    packed = codes[..., :16] | (codes[..., 16:] << 4)
    return torch.cat((scale.unsqueeze(-1), packed), -1).view(rows, -1).numpy()


def write_gguf(model: Any, path: Path) -> None:
    import gguf
    import torch

    from upwell.checkpoint.names import official_name

    c = model.config
    writer = gguf.GGUFWriter(str(path), "deepseek4")
    for key, value in {
        "vocab_size": c.vocab_size, "context_length": CONTEXT, "embedding_length": c.hidden_size,
        "embedding_length_out": c.hidden_size * c.hc_mult, "block_count": c.num_hidden_layers,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "rope.dimension_count": c.qk_rope_head_dim, "attention.q_lora_rank": c.q_lora_rank,
        "attention.sliding_window": c.sliding_window, "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok, "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_count": c.n_shared_experts, "expert_gating_func": 4,
        "attention.indexer.head_count": c.index_n_heads, "attention.indexer.key_length": c.index_head_dim,
        "attention.indexer.top_k": c.index_topk, "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank, "hyper_connection.count": c.hc_mult,
        "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters, "hash_layer_count": c.num_hash_layers,
    }.items():  # fmt: skip
        writer.add_uint32(f"deepseek4.{key}", value)
    for key, number in {
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "expert_weights_scale": c.routed_scaling_factor,
        "rope.freq_base": c.rope_theta, "attention.compress_rope_freq_base": c.compress_rope_theta,
        "hyper_connection.epsilon": c.hc_eps,
    }.items():  # fmt: skip
        writer.add_float32(f"deepseek4.{key}", number)
    writer.add_bool("deepseek4.expert_weights_norm", True)
    writer.add_array("deepseek4.attention.compress_ratios", list(c.compress_ratios))
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        writer.add_array(f"deepseek4.{key}", [c.swiglu_limit] * c.num_hidden_layers)
    writer.add_string("tokenizer.ggml.model", "none")

    def add(name: str, tensor: Any) -> None:
        if tensor.dtype == torch.bfloat16 and tensor.dim() > 1:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            plain = tensor.int() if not tensor.is_floating_point() else tensor.float()
            writer.add_tensor(name, plain.contiguous().numpy())

    for ours, tensor in model.state_dict().items():
        name = official_name(ours)
        if name in TOP:
            add(TOP[name], tensor)
            continue
        _, layer, rest = name.split(".", 2)
        if rest in NAMES:
            add(f"blk.{layer}.{NAMES[rest]}.weight", tensor)
        elif rest == "ffn.gate.bias":
            add(f"blk.{layer}.exp_probs_b.bias", tensor)
    inter = c.moe_intermediate_size
    for layer, block in enumerate(model.layers):
        experts = block.ffn.experts
        for leaf, to in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            name = f"blk.{layer}.ffn_{to}_exps.weight"
            if experts.packed is not None:
                import numpy as np

                data = np.stack([mxfp4(*expert[leaf]) for expert in experts.packed])
                writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
            else:
                add(name, {"w1": experts.w13[:, :inter], "w3": experts.w13[:, inter:], "w2": experts.w2}[leaf].detach())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(a: Any, b: Any) -> dict[str, float]:
    """Logits [S, V] of both: the mean over positions of their correlation, and how often the best token agrees."""
    import torch

    both = torch.stack((a, b))
    centred = both - both.mean(-1, keepdim=True)
    correlation = (centred[0] * centred[1]).sum(-1) / centred.norm(dim=-1).prod(0)
    return {"correlation": float(correlation.mean()), "least_correlation": float(correlation.min()),
            "same_best": float((a.argmax(-1) == b.argmax(-1)).float().mean())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("bf16", "fp4"), action="append", help="default: both")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.threads)
        return

    import torch
    from vs_transformers import Ours

    from upwell.bench.record import cpu_name
    from upwell.ops import native

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    machine = {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__,
               "python": platform.python_version(), "kernels": native.describe()}  # fmt: skip
    print(f"$ {' '.join(sys.argv)}\n{machine}", flush=True)
    rows: list[dict[str, Any]] = []
    for kind in args.kind or ["bf16", "fp4"]:
        model = build(kind)
        ids = torch.randint(0, model.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(1))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            theirs, ours = Theirs(args.llama_python, path, args.threads), Ours(model)
            probe = ids[:, :96]
            mine = model(probe, *ours.step(probe))[0]
            agreement = compare(mine, torch.tensor(theirs.ask(do="logits", ids=probe[0].tolist())))
            print(f"{kind}: llama-cpp-python {theirs.version}, logits: {agreement}", flush=True)
            if agreement["correlation"] < 0.99:
                raise SystemExit("not the same model: no comparison")
            rows.append({"kind": kind, "llama_cpp_python": theirs.version, "agreement": agreement,
                         **race(ours, theirs, ids, args.rounds)})  # fmt: skip
            theirs.child.kill()
    if args.json is not None:
        record = {"command": sys.argv, "machine": machine, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def race(ours: Any, theirs: Theirs, ids: Any, rounds: int) -> dict[str, Any]:
    tokens = ids[0].tolist()
    times: dict[str, list[float]] = {k: [] for k in ("our prefill", "their prefill", "our decode", "their decode")}

    def timed(run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    ours.prefill(ids)
    theirs.ask(do="prefill", ids=tokens)
    for _ in range(rounds):
        times["our prefill"].append(timed(lambda: ours.prefill(ids)))
        times["their prefill"].append(theirs.ask(do="prefill", ids=tokens))
        run = ours.decode(ids, STEPS)
        run()
        times["our decode"].append(timed(run) / STEPS)
        times["their decode"].append(theirs.ask(do="decode", steps=STEPS))
    result: dict[str, Any] = {"seconds": times}
    for what, tokens_each in (("prefill", PREFILL), ("decode", 1)):
        each = [times[f"{who} {what}"] for who in ("our", "their")]
        mine, other = map(statistics.median, each)
        result[what] = {"ours_tok_s": tokens_each / mine, "theirs_tok_s": tokens_each / other, "ratio": other / mine}
        spread = [f"{tokens_each / max(t):,.0f}..{tokens_each / min(t):,.0f}" for t in each]
        print(f"  {what}: ours {tokens_each / mine:,.0f} ({spread[0]})  "
              f"llama.cpp {tokens_each / other:,.0f} ({spread[1]})"
              f"  {other / mine:.2f}x: {'ahead' if other > mine else 'BEHIND'}", flush=True)  # fmt: skip
    return result


if __name__ == "__main__":
    main()
