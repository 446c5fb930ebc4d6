"""Upwell against llama.cpp on the same V4 weights: prefill and decode at batch 1, same threads, on a CPU.

    python benchmarks/vs_llama_cpp.py [--kind f32|bf16|fp4] [--llama-python PATH] [--json OUT]

The model is that of vs_transformers.py with one dimension changed, for both sides: index_head_dim is 128, as Flash's,
not 32. llama.cpp rotates the indexer's queries and keys by a Hadamard matrix at least 64 wide
(llama_kv_cache::build_input_k_rot) and stops on an assertion where a head is narrower; and at 64, which is head_dim
here, it would rotate the attention's own queries and keys too, in vain.

Matrices have BF16 values. Kinds: f32 stores them as FP32 (llama.cpp's cache too), bf16 as BF16, fp4 as BF16 but for the
routed experts, which are FP4 (GGUF's MXFP4): both sides hold the same values. This script writes the GGUF (package
`gguf`) and runs llama.cpp through llama-cpp-python >= 0.3.36 in the interpreter --llama-python, a child that is asked
in turn with our side. llama.cpp has the fastest of its settings for each row: size of micro-batches, flash attention.

Logits are compared first, llama.cpp's without flash attention (which would round keys to FP16). With f32 they must be
equal to 1e-4 of their scale. Otherwise llama.cpp rounds activations to BF16, or 8 bits in front of FP4, and with random
weights that turns many a choice of experts: how far is compared with what our own model does when its norms' outputs
are rounded to BF16. Where that doesn't explain it, the run stops. Nothing is written but OUT and temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vs_transformers

THREADS = 2
PREFILLS = (512, 2048)
AFTER, STEPS, CONTEXT = 512, 32, 4096  # decode: steps timed, as many before them as a warm-up, after so many tokens
PROMPT, ALONE = 1024, 32  # logits are compared at so many tokens in one batch, then so many one at a time
GEOMETRY = {**vs_transformers.GEOMETRY, "index_head_dim": 128}
SETTINGS = [(ubatch, flash) for ubatch in (128, 512, 2048) for flash in (0, 1)]
KINDS = ("f32", "bf16", "fp4")


# ---- llama.cpp's side: a child process, without torch ----


class LlamaCpp:
    """The model in `path`, with a context for each of SETTINGS."""

    def __init__(self, path: str, threads: int, cache: str) -> None:
        import llama_cpp as api

        @api.llama_log_callback
        def errors(level: int, text: bytes, _: Any) -> None:
            if level == 4:  # GGML_LOG_LEVEL_ERROR
                sys.stderr.write(text.decode())

        self.api, self.log = api, errors
        api.llama_log_set(errors, None)
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise SystemExit("llama.cpp can't load the model")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.contexts = {setting: self._context(threads, cache, *setting) for setting in SETTINGS}
        self.chosen = dict.fromkeys([f"prefill {n}" for n in PREFILLS] + ["decode"], SETTINGS[0])

    def _context(self, threads: int, cache: str, ubatch: int, flash: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = params.n_batch = CONTEXT
        params.n_ubatch, params.flash_attn_type = ubatch, flash
        params.n_threads = params.n_threads_batch = threads
        if cache == "f32":
            params.type_k = params.type_v = self.api.GGML_TYPE_F32
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise SystemExit("llama.cpp can't make a context")
        return context

    def clear(self, context: Any) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)

    def extend(self, context: Any, ids: list[int]) -> int:
        """The token with the best logit after ids, which follow what is in the cache."""
        tokens = (self.api.llama_token * len(ids))(*ids)  # the batch points into it
        self._decode(context, self.api.llama_batch_get_one(tokens, len(ids)))
        return int(self._array(self.api.llama_get_logits_ith(context, -1), (self.vocab,)).argmax())

    def logits(self, ids: list[int]) -> Any:
        """Logits [S, V]: of PROMPT tokens in one batch, then of the others one at a time."""
        import numpy as np

        context = self.contexts[512, 0]
        self.clear(context)
        batch = self.api.llama_batch_init(PROMPT, 0, 1)
        parts = []
        for begin, count in [(0, PROMPT), *((at, 1) for at in range(PROMPT, len(ids)))]:
            batch.n_tokens = count
            for i in range(count):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = ids[begin + i], begin + i, 1, True
                batch.seq_id[i][0] = 0
            self._decode(context, batch)
            parts.append(self._array(self.api.llama_get_logits(context), (count, self.vocab)).copy())
        self.api.llama_batch_free(batch)
        return np.concatenate(parts)

    def time(self, what: str, ids: list[int], setting: tuple[int, int] | None = None) -> float:
        """Seconds of a prefill of ids, or of a greedy step after them."""
        context = self.contexts[setting or self.chosen[what]]
        self.clear(context)
        begin = time.perf_counter()
        token = self.extend(context, ids)
        if what != "decode":
            return time.perf_counter() - begin
        for _ in range(STEPS):
            token = self.extend(context, [token])
        begin = time.perf_counter()
        for _ in range(STEPS):
            token = self.extend(context, [token])
        return (time.perf_counter() - begin) / STEPS

    def tune(self, what: str, ids: list[int]) -> tuple[int, int]:
        """Choose the fastest of SETTINGS: the best of three runs each."""
        best = {setting: min(self.time(what, ids, setting) for _ in range(3)) for setting in SETTINGS}
        self.chosen[what] = min(SETTINGS, key=best.__getitem__)
        return self.chosen[what]

    def _decode(self, context: Any, batch: Any) -> None:
        if self.api.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def _array(self, pointer: Any, shape: tuple[int, ...]) -> Any:
        import numpy as np

        return np.ctypeslib.as_array(pointer, shape=shape)


def serve(path: str, threads: int, cache: str) -> None:
    """Answers lines of JSON on stdin with lines of JSON: {"do": "logits"|"tune"|"time", ...}."""
    import numpy as np

    llama = LlamaCpp(path, threads, cache)
    system = llama.api.llama_print_system_info().decode()  # instruction sets it was built for, and what it repacks
    print(json.dumps({"version": llama.api.__version__, "system": system}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        if ask["do"] == "logits":
            np.save(ask["to"], llama.logits(ask["ids"]))
            answer: Any = None
        elif ask["do"] == "tune":
            answer = llama.tune(ask["what"], ask["ids"])
        else:
            answer = llama.time(ask["what"], ask["ids"])
        print(json.dumps(answer), flush=True)


class Theirs:
    def __init__(self, python: str, path: Path, threads: int, cache: str) -> None:
        command = [python, __file__, "--serve", str(path), "--threads", str(threads), "--cache", cache]
        # A failed assertion would have gdb print on stdout.
        env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.build = self._read()

    def ask(self, **what: Any) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(what) + "\n")
        self.child.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.child.kill()
        self.child.wait()

    def _read(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp's process ended with code {self.child.wait()}")
        return json.loads(line)


# ---- our side ----

def build(kind: str) -> Any:
    """The model: matrices of BF16 values, stored as FP32 (kind f32) or BF16; kind fp4: routed experts packed."""
    import torch
    from torch import nn

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
        if kind == "f32":
            return model
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


def rounded(model: Any, ids: Any) -> Any:
    """Logits [S, V] of ids [1, S] when the outputs of norms are rounded to BF16."""
    from upwell.model.layers import RMSNorm

    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    hooks = [norm.register_forward_hook(lambda module, args, out: out.bfloat16().to(out.dtype)) for norm in norms]
    logits = model(ids)[0]
    for hook in hooks:
        hook.remove()
    return logits


def agreement(logits: Any, others: Any, taken: int) -> dict[str, dict[str, float]]:
    """Logits [S, V] of two runs, by part: while all entries are taken (positions below `taken`), where the indexer
    selects, and one token at a time. Of each: the mean over positions of the correlation over the vocabulary, the share
    of positions whose best token is the same, and of those whose logits are equal to 1e-4 of their scale."""
    import torch

    both = torch.stack((logits, others))
    centred = both - both.mean(-1, keepdim=True)
    correlation = (centred[0] * centred[1]).sum(-1) / centred.norm(dim=-1).prod(0)
    best = (logits.argmax(-1) == others.argmax(-1)).float()
    equal = ((logits - others).abs().amax(-1) <= 1e-4 * logits.abs().max()).float()
    parts = {"all taken": slice(0, taken), "selected": slice(taken, PROMPT), "one at a time": slice(PROMPT, None)}
    return {
        name: {"correlation": float(correlation[part].mean()), "same_best": float(best[part].mean()),
               "equal": float(equal[part].mean())}
        for name, part in parts.items()
    }  # fmt: skip


def check(kind: str, agrees: dict[str, dict[str, float]], control: dict[str, dict[str, float]]) -> None:
    """Stop where rounding doesn't explain a difference: f32 has none, but for scores within rounding at the indexer's
    cut (1 position of 100, as in vs_transformers.py)."""
    for part, figures in agrees.items():
        print(f"  {part}: {figures}; ours rounded to BF16: {control[part]}", flush=True)
        same = figures["equal"] >= (1.0 if part == "all taken" else 0.99)
        near = 1 - figures["correlation"] <= 3 * (1 - control[part]["correlation"])
        if not (same if kind == "f32" else near):
            raise SystemExit("not the same model: no comparison")


def race(ours: Any, theirs: Theirs, ids: Any, rounds: int) -> dict[str, Any]:
    """Each row's runs alternate; the medians' ratio is above 1 where ours is faster."""

    def prefill(n: int) -> float:
        begin = time.perf_counter()
        ours.prefill(ids[:, :n])
        return time.perf_counter() - begin

    def decode(n: int) -> float:
        run = ours.decode(ids[:, :n], STEPS)
        run()
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) / STEPS

    tests: list[tuple[str, int, Callable[[int], float]]] = [(f"prefill {n}", n, prefill) for n in PREFILLS]
    result: dict[str, Any] = {}
    for name, n, run in [*tests, ("decode", AFTER, decode)]:
        tokens = ids[0, :n].tolist()
        ubatch, flash = theirs.ask(do="tune", what=name, ids=tokens)
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        run(n)
        for _ in range(rounds):
            times["ours"].append(run(n))
            times["theirs"].append(theirs.ask(do="time", what=name, ids=tokens))
        each = 1 if name == "decode" else n
        mine, other = (each / statistics.median(t) for t in times.values())
        result[name] = {"ours_tok_s": mine, "theirs_tok_s": other, "ratio": mine / other, "seconds": times,
                        "llama_cpp": {"n_ubatch": ubatch, "flash_attn": flash}}  # fmt: skip
        spread = [f"{each / max(t):,.0f}..{each / min(t):,.0f}" for t in times.values()]
        print(f"  {name:12s} ours {mine:,.0f} ({spread[0]})  llama.cpp {other:,.0f} ({spread[1]}; "
              f"micro-batch {ubatch}, flash attention {'on' if flash else 'off'})  {mine / other:.2f}x: "
              f"{'ahead' if mine > other else 'BEHIND'}", flush=True)  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.threads, args.cache)
        return

    import numpy as np
    import torch
    from gguf_v4 import write_gguf
    from vs_transformers import MALLOC, Ours

    from upwell.bench.record import cpu_name
    from upwell.ops import native

    if any(os.environ.get(name) != value for name, value in MALLOC.items()):  # both sides: the child inherits it
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    machine = {"cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__,
               "python": platform.python_version(), "kernels": native.describe()}  # fmt: skip
    print(f"$ {' '.join(sys.argv)}\n{machine}", flush=True)
    rows: list[dict[str, Any]] = []
    for kind in args.kind or KINDS:
        model = build(kind)
        ids = torch.randint(0, model.config.vocab_size, (1, max(PREFILLS)), generator=torch.Generator().manual_seed(1))
        with tempfile.TemporaryDirectory() as folder:
            path, logits = Path(folder) / "model.gguf", Path(folder) / "logits.npy"
            write_gguf(model, path, CONTEXT)
            theirs, ours = Theirs(args.llama_python, path, args.threads, kind), Ours(model)
            probe = ids[:, : PROMPT + ALONE]
            theirs.ask(do="logits", ids=probe[0].tolist(), to=str(logits))
            mine = model(probe, *ours.step(probe))[0]
            taken = 4 * model.config.index_topk
            agrees = agreement(mine, torch.from_numpy(np.load(logits)), taken)
            print(f"{kind}: llama-cpp-python {theirs.build['version']}, logits:", flush=True)
            check(kind, agrees, control := agreement(mine, rounded(model, probe), taken))
            rows.append({"kind": kind, "llama_cpp_python": theirs.build, "agreement": agrees,
                         "ours_rounded": control, **race(ours, theirs, ids, args.rounds)})  # fmt: skip
            theirs.close()
    if args.json is not None:
        record = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "machine": machine, "geometry": GEOMETRY,
                  "rows": rows}  # fmt: skip
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
