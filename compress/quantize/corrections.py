"""What methods share that store a target as a quantized base and a low-rank correction of its error.

They differ in the metric in which the error is decomposed. Factors of rank k are the leading part of one decomposition, so that
a target is solved once for every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..base import Factored, Solution, TargetStats, balanced
from ..forms.grids import Grid
from ..forms.quantized import Quantized, QuantizedLowRank
from ..low_rank.svd_llm import Projected
from ..metric import Metric
from ..options import Choice, Option, Shape
from .factors import quantize_factors
from .gptq import Compensator
from .rtn import Bits, OneGridSettings


class CorrectionSettings(OneGridSettings):
    """Settings of methods with a quantized base and a low-rank correction."""

    bits: Bits = Field(4, description="bits of a code of the base")
    rank: int | None = Field(32, ge=0, description="of the correction; null: as large as the budget allows")
    factor_bits: Literal[16, 8, 4] = Field(16, description="of the factors; 16: in the checkpoint's own dtype")

    @property
    def base_grid(self) -> Grid:
        return self.of(self.bits)

    @property
    def factor_grid(self) -> Grid | None:
        """The factors' grid (symmetric), None where they stay in the checkpoint's dtype."""
        return None if self.factor_bits == 16 else Grid(self.factor_bits, self.group_size, self.grid)

    def choice(self, rank: int) -> Choice:
        """The choice of a rank, everything else as the settings say."""
        return Choice(rank, self.bits, None if self.factor_bits == 16 else self.factor_bits)


def correction_options(shape: Shape, settings: Any, multiple: int) -> list[Option]:
    """The rank of the settings, or every rank in steps of `multiple` from 0; none that is not smaller than the matrix.

    A rank past the smaller side of the matrix is that side.
    """
    most = min(shape.out_features, shape.in_features)
    ranks = range(0, most + 1, multiple) if settings.rank is None else [min(settings.rank, most)]
    options = [Option(settings.choice(rank), _nbytes(shape, settings, rank)) for rank in ranks]
    return [option for option in options if option.nbytes < shape.nbytes]


def _nbytes(shape: Shape, settings: CorrectionSettings, rank: int) -> int:
    base = settings.base_grid.nbytes(shape.out_features, shape.in_features, shape.element)
    if rank == 0:
        return base
    grid = settings.factor_grid
    if grid is None:
        return base + rank * (shape.out_features + shape.in_features) * shape.element
    return base + grid.nbytes(rank, shape.in_features, shape.element) + grid.nbytes(shape.out_features, rank, shape.element)


@dataclass(frozen=True)
class Corrected(Solution):
    """A quantized base, and its error solved for every rank.

    Args:
        weight: (out, in).
        base: the weight on a grid.
        error: the solution of weight - base, whose energies are in `metric`.
        metric: in which losses are measured.
        grid: of the factors; None leaves them in the checkpoint's dtype.
        ready: with which the factors are put on their grid; None rounds to nearest.
        ridge: damping of the gram that base or factors were rounded with.
    """

    weight: Tensor
    base: Quantized
    error: Factored | Projected
    metric: Metric
    grid: Grid | None = None
    ready: Compensator | None = None
    ridge: float = 0.0
    _done: dict[int, Quantized | QuantizedLowRank] = field(default_factory=dict, init=False, repr=False, compare=False)

    def form(self, choice: Choice) -> Quantized | QuantizedLowRank:
        rank = self.error.rank(choice)
        if rank not in self._done:
            self._done.clear()  # a survey asks for many ranks once each; what is kept is the last one
            self._done[rank] = self._form(rank)
        return self._done[rank]

    def _form(self, rank: int) -> Quantized | QuantizedLowRank:
        if rank == 0:
            return self.base
        low = self.error.form(Choice(rank=rank))
        if self.grid is None:
            return QuantizedLowRank(self.base, low)
        target = self.weight.double() - self.base.dense()
        product = quantize_factors(target, low.left, low.right, self.metric, self.grid, self.ready)
        return QuantizedLowRank(self.base, product)

    def loss(self, choice: Choice) -> float:
        if self.grid is None or choice.rank == 0:
            return self.error.loss(choice)
        return self.metric.energy(self.weight.double() - self.form(choice).dense())

    @property
    def total(self) -> float:
        return self.metric.energy(self.weight)

    @property
    def damping(self) -> float:
        return self.ridge


def corrected_by_channel(weight: Tensor, settings: CorrectionSettings, scale: Tensor | None) -> Corrected:
    """Round to nearest, and the SVD of E diag(scale), E the error: exact in the metric of diag(scale²).

    Args:
        weight: (out, in).
        scale: (in,) positive, how much an error in each input channel counts; None: all alike.
    """
    base = Quantized.nearest(weight, settings.base_grid)
    error = weight.double() - base.dense()
    divisor = 1.0 if scale is None else scale.double()
    left, values, right = torch.linalg.svd(error * divisor, full_matrices=False)
    left, right = balanced(left * values, right / divisor)
    metric = Metric(None if scale is None else scale.double() ** 2)
    return Corrected(weight, base, Factored(values**2, left, right), metric, settings.factor_grid)


def best_correction(error: Tensor, stats: TargetStats) -> Projected:
    """The best map of every rank for an error (out, in) in the metric of the input gram."""
    directions = stats.group.directions(error)
    return Projected(directions.values, error, directions)


def positive(scale: Tensor) -> Tensor:
    """The scale (in,) float64 with the smallest positive value in the place of zeros; ones where nothing was ever read."""
    scale = scale.double()
    seen = scale[scale > 0]
    return scale.clamp_min(seen.min()) if len(seen) else torch.ones_like(scale)
