"""The output head with cross-entropy as one node, by the C++ kernels (FP32, CPU): logits are never kept.

A block of tokens' logits become their gradients and go into both products at once, so the gradients are there before
the backward pass asks for them.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from upwell.ops import training_kernels

IGNORED = -100  # the target of a token that doesn't count, as in PyTorch
_BLOCK_FLOATS = 17 << 18  # logits at a time: they stay in the last cache
_MIN_BLOCK, _STEP = 64, 256  # tokens: a block, and what blocks are a multiple of where they are that long (kDepth)
_LINE = 16  # kTrainingLine


class _Call(ctypes.Structure):
    """LossTraining of csrc/training.h."""

    _fields_ = [
        *((name, c_int64) for name in ("tokens", "dim", "vocab", "block")),
        ("share", c_float),
        *((name, c_void_p) for name in ("x", "weight", "targets", "logits", "losses", "grad_x", "grad_weight")),
    ]  # fmt: skip


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        x, weight, targets = x.contiguous(), weight.contiguous(), targets.contiguous()
        (tokens, dim), vocab = x.shape, weight.shape[0]
        counted = int((targets != IGNORED).sum())
        row = (vocab + _LINE - 1) // _LINE * _LINE | _LINE
        block = _BLOCK_FLOATS // row
        block = min(tokens, max(_MIN_BLOCK, block - block % _STEP if block > _STEP else block))
        logits, losses = x.new_empty(block, row), x.new_empty(tokens)
        grads = torch.empty_like(x), torch.empty_like(weight)
        addresses = (t.data_ptr() for t in (x, weight, targets, logits, losses, *grads))
        training_kernels.run_whole("loss", _Call(tokens, dim, vocab, block, 1 / max(counted, 1), *addresses))
        ctx.save_for_backward(*grads)
        return losses.sum() / counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the logits x weight^T: x [T, D], weight [V, D], targets [T] INT64 -> scalar, FP32.

    Tokens with target IGNORED don't count. IndexError for any other target outside [0, V).
    """
    if bool(((targets < 0) & (targets != IGNORED) | (targets >= weight.shape[0])).any()):
        raise IndexError(f"a target is outside the vocabulary of {weight.shape[0]}")
    loss: Tensor = _HeadLoss.apply(x, weight, targets)
    return loss
