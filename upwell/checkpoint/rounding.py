"""Better rounding than to the nearest of amax / levels: a searched scale, and GPTQ's compensation of errors.

Both take what the weight is multiplied with into account, where a sample of it is known. The integers and scales that
come out are those of formats/int4.py and int8.py; only their values differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST, STEPS = 0.4, 31  # the searched scales: this part of amax / levels up to all of it
DAMPING = 0.1  # of the mean of the Gram matrix's diagonal, added to the diagonal
BLOCK = 128  # columns whose errors are carried together


def search_scale(weight: Tensor, levels: int, group: int | None = None, importance: Tensor | None = None) -> Tensor:
    """The scale of each row [out] (or group of columns [out, in/group], a BF16 number) with the least squared error.

    weight [out, in]; importance [in]: what a column's squared error counts, the mean square of its inputs; None: 1.
    """
    rows, cols = weight.shape
    values = weight.float().view(rows, -1, group or cols)
    counts = torch.ones(cols) if importance is None else importance.float()
    counts = counts.view(1, -1, group or cols)
    amax = values.abs().amax(-1, keepdim=True)
    full = torch.where(amax > 0, amax, 1.0) / levels
    best, least = full, torch.full_like(full, torch.inf)
    for part in torch.linspace(1.0, SMALLEST, STEPS).tolist():
        scale = full * part
        if group is not None:
            scale = scale.bfloat16().float()
        error = (values / scale).round_().clamp_(-levels, levels).mul_(scale).sub_(values).square_().mul_(counts)
        total = error.sum(-1, keepdim=True)
        best, least = torch.where(total < least, scale, best), torch.minimum(total, least)
    return best.squeeze(-1) if group is not None else best.view(rows)


def gptq(weight: Tensor, scale: Tensor, gram: Tensor, levels: int) -> Tensor:
    """Integers int8 [out, in] for which the outputs are nearest (Frantar et al. 2022), at a given scale.

    gram [in, in]: inputs^T inputs. Columns are rounded from the one with the largest inputs on; what rounding one did
    to the outputs is made up for by those that aren't rounded yet, as far as inputs go together. scale as in
    `search_scale`. Takes 5 times the gram's memory.
    """
    rows, cols = weight.shape
    order = gram.diagonal().argsort(descending=True, stable=True)
    back = order.argsort()
    steps = scale.view(rows, -1, 1).expand(-1, -1, cols // scale.view(rows, -1).shape[1]).reshape(rows, cols)[:, order]
    left = weight.float()[:, order]
    damped = gram.float()[order][:, order]
    damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()) + 1e-20)
    # Row j of this factor tells how column j's error is spread over the columns after it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    del damped
    carry = torch.linalg.cholesky(inverse, upper=True)
    del inverse
    codes = torch.empty(rows, cols, dtype=torch.int8)
    for first in range(0, cols, BLOCK):
        last = min(first + BLOCK, cols)
        errors = torch.empty(rows, last - first)
        for j in range(first, last):
            step = steps[:, j]
            rounded = (left[:, j] / step).round_().clamp_(-levels, levels)
            codes[:, j] = rounded.to(torch.int8)
            error = (left[:, j] - rounded * step) / carry[j, j]
            left[:, j + 1 : last] -= error.unsqueeze(1) * carry[j, j + 1 : last]
            errors[:, j - first] = error
        left[:, last:] -= errors @ carry[first:last, last:]
    return codes[:, back]
