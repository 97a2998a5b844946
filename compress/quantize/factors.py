"""Low-rank factors of few bits, on a grid or in a code.

The right factor is quantized first, in the metric of the target's input. The left factor is then refitted to the output of the
quantized right factor, which compensates for most of its error, and is quantized in the metric of that output.

Source: the order of SVD-LLM's combination with GPTQ (arXiv 2403.07378, §4) with a refit in between. Repeated, it is the inner
loop of CALDERA's factorization (arXiv 2405.18886, algorithm 2, LPLRFactorize).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from ..chain import refit
from ..forms.base import Form
from ..forms.codes.code import Code
from ..forms.codes.encoded import Encoded
from ..forms.grids import Grid
from ..forms.product import Product
from ..forms.quantized import Quantized
from ..metric import Metric
from .gptq import Compensator, compensator
from .trellis import encoded, turned_gram

Base = Literal["rtn", "gptq"]


class FactorBits(Protocol):
    """How factors are stored in few bits."""

    def right(self, matrix: Tensor) -> Form:
        """The right factor (rank, in), which reads the target's input."""
        ...

    def leveled(self, left: Tensor, right: Form) -> tuple[Tensor, Form, Tensor]:
        """The same product in factors that are easier to store, and the numbers (rank,) that multiplied the rows of right."""
        ...

    def left(self, matrix: Tensor, gram: Tensor) -> Form:
        """The left factor (out, rank), whose inputs have this gram (rank, rank)."""
        ...


@dataclass(frozen=True)
class OnGrid(FactorBits):
    """Factors on a grid.

    Args:
        grid: of both factors.
        ready: GPTQ for the right factor; the left one gets the same damping and order. None rounds both to nearest.
    """

    grid: Grid
    ready: Compensator | None = None

    def right(self, matrix: Tensor) -> Quantized:
        return self._on_grid(matrix, self.ready)

    def leveled(self, left: Tensor, right: Form) -> tuple[Tensor, Form, Tensor]:
        """A group of the left factor contains several components: their columns become nearly equally long.

        The fit enlarges components with little input energy, whose columns would determine the steps of their whole groups.
        What multiplies the rows of the right factor are powers of two, so it remains on its grid.
        """
        assert isinstance(right, Quantized)
        size = left.norm(dim=0)
        power = torch.where(size > 0, torch.exp2(torch.log2(size.clamp_min(1e-300)).round()), 1.0)
        scales = replace(right.scales, steps=right.scales.steps * power[:, None])
        return left / power, replace(right, scales=scales), power

    def left(self, matrix: Tensor, gram: Tensor) -> Quantized:
        fitted = compensator(gram, self.ready.damping, self.ready.order is not None) if self.ready else None
        return self._on_grid(matrix, fitted)

    def _on_grid(self, matrix: Tensor, by: Compensator | None) -> Quantized:
        return by.quantize(matrix, self.grid) if by else Quantized.nearest(matrix, self.grid)


@dataclass(frozen=True)
class InOneCode(FactorBits):
    """Factors in a code, each rotated on both sides, with feedback.

    Args:
        code: of both factors.
        seed: of the rotations; four numbers from it are taken.
        factor: (in, in) float64 upper triangular R with R Rᵀ = the damped gram of the rotated input.
        damping: of the gram that the left factor reads, relative to its mean diagonal.
    """

    code: Code
    seed: int
    factor: Tensor | None
    damping: float

    @classmethod
    def of(cls, code: Code, seed: int, gram: Tensor, damping: float) -> Self:
        """For targets whose input has this gram (in, in)."""
        return cls(code, seed, compensator(turned_gram(gram, seed), damping, act_order=False).factor, damping)

    def right(self, matrix: Tensor) -> Encoded:
        return encoded(matrix, self.code, self.seed, self.factor)

    def leveled(self, left: Tensor, right: Form) -> tuple[Tensor, Form, Tensor]:
        """Nothing changes: the rotation mixes the components."""
        return left, right, left.new_ones(left.shape[1])

    def left(self, matrix: Tensor, gram: Tensor) -> Encoded:
        seed = self.seed + 2
        return encoded(matrix, self.code, seed, compensator(turned_gram(gram, seed), self.damping, act_order=False).factor)


def quantize_factors(target: Tensor, left: Tensor, right: Tensor, metric: Metric, bits: FactorBits, rounds: int = 1) -> Product:
    """Factors of `target` (out, in) in few bits; of several rounds the one with the lowest error in the metric.

    Args:
        left, right: (out, rank) and (rank, in), the starting point.
        metric: of the target's input.
        bits: how they are stored.
        rounds: how often both factors are refitted and quantized; it stops at the first round that is not better.
    """
    # an error of the right factor counts as much in each component where the columns of the left one are equally long
    size = left.double().norm(dim=0)
    size = torch.where(size > 0, size, 1.0)
    left, right = left.double() / size, right.double() * size[:, None]
    best: tuple[float, Product] | None = None
    for turn in range(rounds):
        if turn:
            assert best is not None
            left = best[1].left.dense()
            right = right + refit((target - left @ right).T @ left, left.T @ left).T
        coarse = bits.right(right)
        values = coarse.dense()
        seen = metric.times(values)
        gram = seen @ values.T
        left = left + refit((target - left @ values) @ seen.T, gram)  # unchanged where inputs have no energy
        left, coarse, power = bits.leveled(left, coarse)
        gram = gram * power[:, None] * power
        product = Product(bits.left(left, gram), coarse, len(right))
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
