"""Low-rank factors on a grid.

The right factor is quantized first, in the metric of the target's input; the left one is then fitted anew to what the
quantized right factor puts out, which makes up for most of what that lost, and is quantized in the metric of that.

Source: the order of SVD-LLM's combination with GPTQ (arXiv 2403.07378, §4) with a refit between, which repeated is the inner
loop of CALDERA's factorization (arXiv 2405.18886, algorithm 2, LPLRFactorize).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..base import TargetStats
from ..chain import refit
from ..forms.base import LowRank
from ..forms.grids import Grid
from ..forms.product import Product
from ..forms.quantized import Quantized
from ..metric import Metric
from .gptq import Compensator, compensator

Base = Literal["rtn", "gptq"]


def quantize_form(
    form: LowRank,
    stats: TargetStats,
    grid: Grid,
    *,
    weight: Tensor | None = None,
    base: Base = "gptq",
    damping: float = 0.01,
    act_order: bool = True,
    rounds: int = 1,
) -> Product:
    """A low-rank form with both factors on a grid.

    Args:
        form: left (out, rank), right (rank, in).
        stats: of the target's input; its gram is read.
        grid: of both factors; groups run along the input of each.
        weight: (out, in) what the product is to stand for; None: what the form stands for.
        base: how a factor is put on the grid.
        damping, act_order: of `gptq`.
        rounds: how often both factors are fitted and quantized; more than one only with settings that gain from it.

    Raises:
        ValueError: gptq without a gram.
    """
    metric = Metric.of(stats)
    ready = None
    if base == "gptq":
        if metric.matrix is None:
            raise ValueError("quantizing factors by gptq needs the gram of the target's input")
        ready = compensator(metric.matrix, damping, act_order)
    target = form.dense() if weight is None else weight
    product = quantize_factors(target.double(), form.left, form.right, metric, grid, ready, rounds)
    return product.with_bias(form.bias)


def _of_one_size(left: Tensor, right: Quantized) -> tuple[Tensor, Quantized, Tensor]:
    """The same product with the columns of left of nearly one length, and by what (rank,) the rows of right grew.

    These are powers of two, which leave right on its grid.
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
    """Factors of `target` (out, in) on a grid; of several rounds the best in the metric.

    Args:
        left, right: (out, rank) and (rank, in), where to start from.
        metric: of the target's input.
        ready: rounds the right factor, and tells the damping and order with which the left one is; None: both to nearest.
    """
    # groups of the left factor run over components: these must be of one size, and a row of the right factor has its own steps
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
        left = left + refit((target - left @ values) @ seen.T, gram)  # where inputs have no energy, left stays what it was
        # the fit stretches components that the inputs hardly see: their columns would set the steps of their whole groups
        left, coarse, power = _of_one_size(left, coarse)
        gram = gram * power[:, None] * power
        fitted = compensator(gram, ready.damping, ready.order is not None) if ready else None
        product = Product(fitted.quantize(left, grid) if fitted else Quantized.nearest(left, grid), coarse, len(right))
        if rounds == 1:
            return product
        if best is None:  # once: losses of all rounds come from it without another product of (out, in) with (in, in)
            ahead = metric.times(target)
            whole = float((ahead * target).sum())
        held = product.left.dense()
        loss = whole - 2 * float((held * (ahead @ coarse.dense().T)).sum()) + float((held @ gram * held).sum())
        if best is not None and loss >= best[0]:
            break
        best = loss, product
    assert best is not None
    return best[1]
