"""V4 a second time, from its published description: numpy, float64, one token after another, nothing shared.

It reads weights from a model (packed ones decoded) and knows both numerics. Slow on purpose: each formula stands as
it is written in the paper and in ARCHITECTURE.md's sections 2 to 9, so that an error in the fast code isn't here too.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from upwell.config import ModelConfig
from upwell.model import Transformer
from upwell.model.layers import Linear
from upwell.model.moe import Experts
from upwell.ops.linear import dense_weight

Array = NDArray[np.float64]


def fp8_rounded(x: Array, group: int) -> Array:
    """Each group of the last axis to e4m3 and back, its scale a power of two."""
    out = np.empty_like(x)
    for begin in range(0, len(x), group):
        part = x[begin : begin + group]
        scale = 2.0 ** math.ceil(math.log2(max(np.abs(part).max(), 1e-4) / 448))
        out[begin : begin + group] = (part / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return out


def fp4_rounded(x: Array, group: int) -> Array:
    out = np.empty_like(x)
    for begin in range(0, len(x), group):
        part = x[begin : begin + group]
        scale = 2.0 ** math.ceil(math.log2(max(np.abs(part).max(), 6 * 2.0**-126) / 6))
        out[begin : begin + group] = (part / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
    return out


def hadamard_matrix(n: int) -> Array:
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / math.sqrt(n)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def sinkhorn(logits: Array, iterations: int, eps: float) -> Array:
    """`iterations` column and one fewer row normalisations after a softmax over each row."""
    c = softmax(logits, axis=1) + eps
    h = len(c)
    for turn in range(iterations):
        if turn:
            c = np.array([[c[i, j] / (sum(c[i, k] for k in range(h)) + eps) for j in range(h)] for i in range(h)])
        c = np.array([[c[i, j] / (sum(c[k, j] for k in range(h)) + eps) for j in range(h)] for i in range(h)])
    return c


class PlainV4:
    def __init__(self, model: Transformer) -> None:
        self.config: ModelConfig = model.config
        self.official = model.numerics == "official"
        self.rounded_inputs: set[str] = set()
        self.w: dict[str, Array] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float8_e4m3fn,):
                self.w[name] = tensor.detach().double().numpy()
            elif tensor.dtype == torch.int64:
                self.w[name] = tensor.numpy()
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                self.w[name + ".weight"] = module.dense(torch.float32).detach().double().numpy()
                if self.official and module.scale is not None:
                    self.rounded_inputs.add(name)
            elif isinstance(module, Experts):
                self._read_experts(name, module)

    def _read_experts(self, name: str, module: Experts) -> None:
        for e in range(module.n):
            if module.packed is not None:
                for leaf, (weight, scale) in module.packed[e].items():
                    self.w[f"{name}.{e}.{leaf}.weight"] = dense_weight(weight, scale, torch.float32).double().numpy()
                    if self.official:
                        self.rounded_inputs.add(f"{name}.{e}.{leaf}")
            else:
                w1, w3 = module.w13[e].detach().double().numpy().reshape(2, -1, module.w13.shape[-1])
                self.w[f"{name}.{e}.w1.weight"], self.w[f"{name}.{e}.w3.weight"] = w1, w3
                self.w[f"{name}.{e}.w2.weight"] = module.w2[e].detach().double().numpy()

    # The parts.

    def linear(self, name: str, x: Array) -> Array:
        if name in self.rounded_inputs:
            x = fp8_rounded(x, 128)
        return self.w[name + ".weight"] @ x

    def rms(self, x: Array, name: str | None = None) -> Array:
        normed = x / math.sqrt(float((x * x).mean()) + self.config.rms_norm_eps)
        return normed if name is None else normed * self.w[name + ".weight"]

    def frequencies(self, compressed: bool) -> list[float]:
        c = self.config
        r, theta = c.qk_rope_head_dim, c.compress_rope_theta if compressed else c.rope_theta
        plain = [theta ** (-2 * i / r) for i in range(r // 2)]
        if not compressed or c.yarn is None:
            return plain

        def dim(rotations: float) -> float:
            return (
                r
                * math.log(c.yarn.original_max_position_embeddings / (2 * math.pi * rotations))
                / (2 * math.log(theta))
            )

        low, high = max(math.floor(dim(c.yarn.beta_fast)), 0), min(math.ceil(dim(c.yarn.beta_slow)), r - 1)
        out = []
        for i, f in enumerate(plain):
            s = 1 - min(max((i - low) / max(high - low, 0.001), 0), 1)
            out.append(f / c.yarn.factor * (1 - s) + f * s)
        return out

    def rotate(self, x: Array, position: int, compressed: bool, sign: int = 1) -> Array:
        r, out = self.config.qk_rope_head_dim, x.copy()
        for i, f in enumerate(self.frequencies(compressed)):
            at = len(x) - r + 2 * i
            z = complex(x[at], x[at + 1]) * np.exp(1j * sign * position * f)
            out[at], out[at + 1] = z.real, z.imag
        return out

    def connect(self, name: str, streams: Array) -> tuple[Array, Array, Array]:
        c, h = self.config, self.config.hc_mult
        f = streams.reshape(-1)
        z = (self.w[name + ".fn"] @ f) / math.sqrt(float((f * f).mean()) + c.rms_norm_eps)
        base, scale = self.w[name + ".base"], self.w[name + ".scale"]
        pre = sigmoid(z[:h] * scale[0] + base[:h]) + c.hc_eps
        if len(z) == h:
            return pre @ streams, pre, pre
        post = 2 * sigmoid(z[h : 2 * h] * scale[1] + base[h : 2 * h])
        mixing = sinkhorn((z[2 * h :] * scale[2] + base[2 * h :]).reshape(h, h), c.hc_sinkhorn_iters, c.hc_eps)
        return pre @ streams, post, mixing

    def entries(self, name: str, xs: list[Array], ratio: int, dim: int, for_index: bool) -> list[Array]:
        """Every complete window's entry."""
        c, overlap, out = self.config, ratio == self.config.csa_ratio, []
        kv = [self.w[name + ".wkv.weight"] @ x for x in xs]
        gate = [self.w[name + ".wgate.weight"] @ x + self.w[name + ".ape"][t % ratio] for t, x in enumerate(xs)]
        for window in range(len(xs) // ratio):
            own = range(window * ratio, (window + 1) * ratio)
            half = slice(dim, None) if overlap else slice(None)
            values, logits = [kv[t][half] for t in own], [gate[t][half] for t in own]
            if overlap and window:
                before = range((window - 1) * ratio, window * ratio)
                values += [kv[t][:dim] for t in before]
                logits += [gate[t][:dim] for t in before]
            pooled = (softmax(np.array(logits), axis=0) * np.array(values)).sum(0)
            entry = self.rotate(self.rms(pooled, name + ".norm"), window * ratio, True)
            if self.official and for_index:
                entry = fp4_rounded(hadamard_matrix(dim) @ entry, 32)
            elif self.official:
                entry = self.latent(entry)
            out.append(entry)
            assert len(entry) == (c.index_head_dim if for_index else c.head_dim)
        return out

    def latent(self, kv: Array) -> Array:
        nope = self.config.nope_head_dim
        return np.concatenate([fp8_rounded(kv[:nope], 64), kv[nope:]]) if self.official else kv

    def selected(self, name: str, x: Array, q_latent: Array, t: int, keys: list[Array]) -> list[int]:
        c, visible = self.config, (t + 1) // self.config.csa_ratio
        if visible <= c.index_topk:
            return list(range(visible))
        queries = self.linear(name + ".wq_b", q_latent).reshape(c.index_n_heads, c.index_head_dim)
        weights = self.w[name + ".weights_proj.weight"] @ x * c.index_head_dim**-0.5 * c.index_n_heads**-0.5
        scores = [0.0] * visible
        for head in range(c.index_n_heads):
            q = self.rotate(queries[head], t, True)
            if self.official:
                q = fp4_rounded(hadamard_matrix(c.index_head_dim) @ q, 32)
            for w in range(visible):
                scores[w] += weights[head] * max(float(q @ keys[w]), 0.0)
        return sorted(range(visible), key=lambda w: (-scores[w], w))[: c.index_topk]

    def attention(self, name: str, xs: list[Array], ratio: int) -> list[Array]:
        c, out = self.config, []
        compressed, is_csa = ratio != 0, ratio == c.csa_ratio
        q_latents = [self.rms(self.linear(name + ".wq_a", x), name + ".q_norm") for x in xs]
        kv = [
            self.latent(self.rotate(self.rms(self.linear(name + ".wkv", x), name + ".kv_norm"), t, compressed))
            for t, x in enumerate(xs)
        ]
        entries = self.entries(name + ".compressor", xs, ratio, c.head_dim, False) if compressed else []
        keys = self.entries(name + ".indexer.compressor", xs, ratio, c.index_head_dim, True) if is_csa else []
        for t, x in enumerate(xs):
            read = [kv[j] for j in range(len(xs)) if t - c.sliding_window < j <= t]
            if is_csa:
                read += [entries[w] for w in self.selected(name + ".indexer", x, q_latents[t], t, keys)]
            elif compressed:
                read += [entry for w, entry in enumerate(entries) if w < (t + 1) // ratio]
            queries = self.linear(name + ".wq_b", q_latents[t]).reshape(c.num_attention_heads, c.head_dim)
            heads = []
            for head in range(c.num_attention_heads):
                q = self.rotate(self.rms(queries[head]), t, compressed)
                weights = [math.exp(float(q @ k) * c.head_dim**-0.5) for k in read]
                total = sum(weights) + math.exp(self.w[name + ".attn_sink"][head])
                mixed = sum((w / total * k for w, k in zip(weights, read, strict=True)), np.zeros(c.head_dim))
                heads.append(self.rotate(mixed, t, compressed, sign=-1))
            out.append(self._project(name, heads))
        return out

    def _project(self, name: str, heads: list[Array]) -> Array:
        c = self.config
        each = c.num_attention_heads // c.o_groups
        parts = [
            self.w[name + ".wo_a.weight"][g * c.o_lora_rank : (g + 1) * c.o_lora_rank]
            @ np.concatenate(heads[g * each : (g + 1) * each])
            for g in range(c.o_groups)
        ]
        return self.linear(name + ".wo_b", np.concatenate(parts))

    def expert(self, name: str, x: Array, weight: float) -> Array:
        limit = self.config.swiglu_limit
        gate = np.minimum(self.linear(name + ".w1", x), limit)
        up = np.clip(self.linear(name + ".w3", x), -limit, limit)
        return self.linear(name + ".w2", weight * gate * sigmoid(gate) * up)

    def moe(self, name: str, x: Array, token: int) -> Array:
        c = self.config
        scores = np.sqrt(np.log1p(np.exp(self.w[name + ".gate.weight"] @ x)))
        if name + ".gate.tid2eid" in self.w:
            chosen = [int(e) for e in self.w[name + ".gate.tid2eid"][token]]
        else:
            biased = scores + self.w[name + ".gate.bias"]
            chosen = sorted(range(c.n_routed_experts), key=lambda e: (-biased[e], e))[: c.num_experts_per_tok]
        total = sum(scores[e] for e in chosen)
        out = self.expert(name + ".shared_experts", x, 1.0)
        for e in chosen:
            out = out + self.expert(f"{name}.experts.{e}", x, scores[e] / total * c.routed_scaling_factor)
        return out

    # The whole.

    def block(self, name: str, streams: list[Array], tokens: list[int], ratio: int) -> list[Array]:
        def sublayer(which: str, apply: Any) -> list[Array]:
            entered = [self.connect(f"{name}.hc_{which}", x) for x in streams]
            outputs = apply([self.rms(u, f"{name}.{which}_norm") for u, _, _ in entered])
            return [
                np.array([post[j] * y + sum(mix[i, j] * x[i] for i in range(len(x))) for j in range(len(x))])
                for x, y, (_, post, mix) in zip(streams, outputs, entered, strict=True)
            ]

        streams = sublayer("attn", lambda xs: self.attention(name + ".attn", xs, ratio))
        return sublayer("ffn", lambda xs: [self.moe(name + ".ffn", x, t) for x, t in zip(xs, tokens, strict=True)])

    def streams(self, tokens: list[int]) -> list[Array]:
        streams = [np.tile(self.w["embed.weight"][t], (self.config.hc_mult, 1)) for t in tokens]
        for layer, ratio in enumerate(self.config.compress_ratios):
            streams = self.block(f"layers.{layer}", streams, tokens, ratio)
        return streams

    def logits(self, streams: list[Array]) -> Array:
        return np.array([self.w["head.weight"] @ self.rms(self.connect("hc_head", x)[0], "norm") for x in streams])

    def draft(self, following: list[int], streams: list[Array]) -> tuple[Array, list[Array]]:
        """MTP: logits of the token after next, and the block's streams."""
        joined = []
        for token, x in zip(following, streams, strict=True):
            embedded = self.linear("mtp.0.e_proj", self.rms(self.w["embed.weight"][token], "mtp.0.enorm"))
            joined.append(np.array([embedded + self.linear("mtp.0.h_proj", self.rms(row, "mtp.0.hnorm")) for row in x]))
        out = self.block("mtp.0", joined, following, 0)
        heads = [self.rms(self.connect("mtp.0.hc_head", x)[0], "mtp.0.norm") for x in out]
        return np.array([self.w["head.weight"] @ x for x in heads]), out
