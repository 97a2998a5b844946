"""Common code of the methods that store a target as a quantized base and a low-rank correction of the base's error.

The methods differ in the metric in which the error is decomposed. The factors of rank k are the leading part of one
decomposition, so a target is solved once for all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..base import Factored, Solution, TargetStats, balanced
from ..forms.grids import Grid
from ..forms.quantized import Quantized, QuantizedLowRank
from ..low_rank.svd_llm import Projected
from ..metric import Metric
from ..options import Choice, Option, Shape
from .factors import OnGrid, quantize_factors
from .gptq import Compensator
from .rtn import Bits, OneGridSettings


class CorrectionSettings(OneGridSettings):
    """Settings of methods with a quantized base and a low-rank correction."""

    sized_by: ClassVar[str] = "rank"

    bits: Bits = Field(4, description="bits per code of the base")
    rank: int | None = Field(32, ge=0, description="rank of the correction; null: as large as the budget allows")
    factor_bits: Literal[16, 8, 4] = Field(16, description="bits of the factors; 16: stored in the checkpoint's own dtype")

    @property
    def base_grid(self) -> Grid:
        """The base's grid."""
        return self.of(self.bits)

    @property
    def factor_grid(self) -> Grid | None:
        """The factors' grid, which is symmetric; None where they are stored in the checkpoint's dtype."""
        return None if self.factor_bits == 16 else Grid(self.factor_bits, self.group_size, self.grid)

    def base_nbytes(self, shape: Shape) -> int:
        """Exact bytes of the base of a matrix of this shape."""
        return self.base_grid.nbytes(shape.out_features, shape.in_features, shape.element)

    def factors_nbytes(self, shape: Shape, rank: int) -> int:
        """Exact bytes of both factors of a matrix of this shape; the rank is at least 1."""
        grid = self.factor_grid
        if grid is None:
            return rank * (shape.out_features + shape.in_features) * shape.element
        return grid.nbytes(rank, shape.in_features, shape.element) + grid.nbytes(shape.out_features, rank, shape.element)

    def choice(self, rank: int) -> Choice:
        """The choice with this rank and the bits of the settings."""
        return Choice(rank, self.bits, None if self.factor_bits == 16 else self.factor_bits)


def correction_options(shape: Shape, settings: Any, multiple: int) -> list[Option]:
    """The rank of the settings, or every rank from 0 in steps of `multiple`, where the form is smaller than the matrix.

    A rank larger than the smaller side of the matrix is replaced by that side.
    """
    most = min(shape.out_features, shape.in_features)
    ranks = range(0, most + 1, multiple) if settings.rank is None else [min(settings.rank, most)]
    options = [Option(settings.choice(rank), _nbytes(shape, settings, rank)) for rank in ranks]
    return [option for option in options if option.nbytes < shape.nbytes]


def _nbytes(shape: Shape, settings: CorrectionSettings, rank: int) -> int:
    return settings.base_nbytes(shape) + (settings.factors_nbytes(shape, rank) if rank else 0)


@dataclass(frozen=True)
class Corrected(Solution):
    """A quantized base, and the low-rank correction of its error for every rank.

    Args:
        weight: (out, in).
        base: the quantized weight.
        error: the solution of weight - base, whose energies are in `metric`.
        metric: in which losses are measured.
        grid: of the factors; None stores them in the checkpoint's dtype.
        ready: GPTQ for the factors; None rounds them to nearest.
        ridge: damping of the gram that GPTQ used for base or factors.
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
            self._done.clear()  # measuring asks for many ranks once each: only the last one is cached
            self._done[rank] = self._form(rank)
        return self._done[rank]

    def _form(self, rank: int) -> Quantized | QuantizedLowRank:
        if rank == 0:
            return self.base
        low = self.error.form(Choice(rank=rank))
        if self.grid is None:
            return QuantizedLowRank(self.base, low)
        target = self.weight.double() - self.base.dense()
        product = quantize_factors(target, low.left, low.right, self.metric, OnGrid(self.grid, self.ready))
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
    """Round to nearest and take the SVD of E diag(scale), E the rounding error: optimal in the metric of diag(scale²).

    Args:
        weight: (out, in).
        scale: (in,) positive, the weight of an error in each input channel; None: 1 for all.
    """
    base = Quantized.nearest(weight, settings.base_grid)
    error = weight.double() - base.dense()
    divisor = 1.0 if scale is None else scale.double()
    left, values, right = torch.linalg.svd(error * divisor, full_matrices=False)
    left, right = balanced(left * values, right / divisor)
    metric = Metric(None if scale is None else scale.double() ** 2)
    return Corrected(weight, base, Factored(values**2, left, right), metric, settings.factor_grid)


def best_correction(error: Tensor, stats: TargetStats) -> Projected:
    """The best correction of every rank for an error (out, in), in the metric of the input gram."""
    directions = stats.group.directions(error)
    return Projected(directions.values, error, directions)


def positive(scale: Tensor) -> Tensor:
    """The scale (in,) in float64 with zeros replaced by the smallest positive value; ones if all are zero."""
    scale = scale.double()
    seen = scale[scale > 0]
    return scale.clamp_min(seen.min()) if len(seen) else torch.ones_like(scale)
