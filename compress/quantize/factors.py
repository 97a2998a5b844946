"""Quantized low-rank factors.

The right factor is quantized first, in the metric of the target's input. The left factor is then refitted to the output of the
quantized right factor, which compensates for most of its error, and is quantized in the metric of that output.

Source: the order of SVD-LLM's combination with GPTQ (arXiv 2403.07378, §4) with a refit in between. Repeated, it is the inner
loop of CALDERA's factorization (arXiv 2405.18886, algorithm 2, LPLRFactorize).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..chain import refit
from ..forms.grids import Grid
from ..forms.product import Product
from ..forms.quantized import Quantized
from ..metric import Metric
from .gptq import Compensator, compensator

Base = Literal["rtn", "gptq"]


def _of_one_size(left: Tensor, right: Quantized) -> tuple[Tensor, Quantized, Tensor]:
    """The same product with columns of left of nearly equal length, and the factors (rank,) that multiplied the rows of right.

    The factors are powers of two, so right remains on its grid.
    """
    size = left.norm(dim=0)
    power = torch.where(size > 0, torch.exp2(torch.log2(size.clamp_min(1e-300)).round()), 1.0)
    return left / power, replace(right, scales=replace(right.scales, steps=right.scales.steps * power[:, None])), power


def quantize_factors(
    target: Tensor,
    left: Tensor,
    right: Tensor,
    metric: Metric,
    grid: Grid,
    ready: Compensator | None = None,
    rounds: int = 1,
) -> Product:
    """Quantized factors of `target` (out, in); of several rounds the one with the lowest error in the metric.

    Args:
        left, right: (out, rank) and (rank, in), the starting point.
        metric: of the target's input.
        grid: of both factors.
        ready: GPTQ for the right factor; the left one gets the same damping and order. None rounds both to nearest.
        rounds: how often both factors are refitted and quantized; it stops at the first round that is not better.
    """
    # a group of the left factor contains several components, which must have equal size; rows of right have steps of their own
    size = left.double().norm(dim=0)
    size = torch.where(size > 0, size, 1.0)
    left, right = left.double() / size, right.double() * size[:, None]
    best: tuple[float, Product] | None = None
    for turn in range(rounds):
        if turn:
            assert best is not None
            left = best[1].left.dense()
            right = right + refit((target - left @ right).T @ left, left.T @ left).T
        coarse = ready.quantize(right, grid) if ready else Quantized.nearest(right, grid)
        values = coarse.dense()
        seen = metric.times(values)
        gram = seen @ values.T
        left = left + refit((target - left @ values) @ seen.T, gram)  # unchanged where inputs have no energy
        # the fit enlarges components with little input energy; their columns would determine the steps of their whole groups
        left, coarse, power = _of_one_size(left, coarse)
        gram = gram * power[:, None] * power
        fitted = compensator(gram, ready.damping, ready.order is not None) if ready else None
        product = Product(fitted.quantize(left, grid) if fitted else Quantized.nearest(left, grid), coarse, len(right))
        if rounds == 1:
            return product
        if best is None:  # once; the losses of all rounds follow from it without another product of (out, in) and (in, in)
            ahead = metric.times(target)
            whole = float((ahead * target).sum())
        held = product.left.dense()
        loss = whole - 2 * float((held * (ahead @ coarse.dense().T)).sum()) + float((held @ gram * held).sum())
        if best is not None and loss >= best[0]:
            break
        best = loss, product
    assert best is not None
    return best[1]
