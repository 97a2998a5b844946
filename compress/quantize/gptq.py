"""GPTQ: weights are rounded column by column, and what a column loses is made up for by those that follow.

With the gram factored as C = R Rᵀ, R upper triangular, the output error is ‖(W - Ŵ) R‖²: column j of that product has all
earlier columns' errors in it, and the best value to round for column j is the one that cancels them. No inverse is formed.

When to use: at 4 and 3 bits wherever calibration can be afforded.

Cost: one Cholesky factor (in, in) per target, and out · in² multiplications for every number of bits. Statistics: a gram.

Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1. Its updates by rows of the inverse's Cholesky factor are the same
in exact arithmetic (R⁻¹ is that factor; the form used here is that of LDLQ in QuIP, arXiv 2307.13304, §3). Differences from
the authors' code: float64; the ridge (1 % of the mean diagonal, as there) grows tenfold where the factor fails, and is
reported; inputs that never fire are rounded to nearest instead of set to zero; with `act_order` (inputs in descending order of
energy) the groups' steps are those of the original weight, so that a group stays a run of neighbours and no index is stored;
`clip` searches the range of each group, weighted by the energy of its inputs (the `mse` option of that code weighs all inputs
alike).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from ...errors import LrcError, NonFiniteError
from ..base import TargetStats, method
from ..forms.grids import Grid, Scales
from ..forms.quantized import Quantized
from ..metric import Metric
from ..options import coarsest
from .rtn import GridSettings, OnGrid, grid_options

_BLOCK = 64  # columns whose errors are carried on one by one; those of earlier blocks by one multiplication
_LEAST_RIDGE = 1e-8  # the first one tried where no damping was asked for and the gram is singular


class GptqSettings(GridSettings):
    """Settings of `gptq`."""

    damping: float = Field(0.01, ge=0, le=1, description="ridge added to the gram, relative to its mean diagonal")
    act_order: bool = Field(True, description="inputs with the most energy first; steps then come from the original weight")
    clip: bool = Field(False, description="let a group give up its extremes where finer steps lose less; as published: no")


@dataclass(frozen=True)
class Compensator:
    """Rounds weights that read one input, each column making up for the errors of those before it.

    Args:
        factor: (in, in) float64 upper triangular R with R Rᵀ = the damped gram in `order`; None rounds to nearest.
        order: (in,) the columns in the order in which they are rounded; None: as they stand.
        damping: the ridge that was needed, relative to the mean diagonal.
    """

    factor: Tensor | None
    order: Tensor | None
    damping: float

    def quantize(self, weight: Tensor, grid: Grid, clip: bool = False) -> Quantized:
        """The weight (out, in) on the grid; with `clip` the groups' ranges are fitted to the energy of their inputs."""
        if self.factor is None:
            return Quantized.nearest(weight, grid)
        weight = weight.double()
        width = grid.width(weight.shape[1])
        energy = self.factor.square().sum(1) if clip else None  # the damped gram's diagonal
        if self.order is None:
            whole = width == weight.shape[1]
            scales = grid.scales(weight) if energy is None or not whole else grid.fitted(weight, energy)
            return _by_columns(weight, self.factor, grid, scales, dynamic=not whole, energy=energy)
        scales = grid.scales(weight) if energy is None else grid.fitted(weight, energy[torch.argsort(self.order)])
        return _by_columns(weight, self.factor, grid, scales, self.order)


def compensator(gram: Tensor, damping: float = 0.01, act_order: bool = True) -> Compensator:
    """Factor a gram (in, in), with more damping where it is singular.

    Args:
        damping: relative to the mean diagonal; it grows tenfold until the factor exists.
        act_order: round the columns with the largest diagonal first.

    Raises:
        NonFiniteError: the gram holds a NaN or an infinity.
        LrcError: it has no factor even with a ridge as large as its mean diagonal: it is no gram.
    """
    if not torch.isfinite(gram).all():
        raise NonFiniteError(f"The gram ({len(gram)} x {len(gram)}) is not finite.", "Its statistics overflowed.")
    gram = gram.double()
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:  # nothing was ever read, as by an expert without tokens
        return Compensator(None, None, 0.0)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    ordered = gram if order is None else gram[order][:, order]
    while True:
        damped = ordered + damping * mean * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        # a Cholesky factor of the matrix turned by 180 degrees is, turned back, an upper triangular one
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and bool(lower.diagonal().min() > 0):
            return Compensator(lower.flip(0, 1), order, damping)
        if damping >= 1:
            raise LrcError(
                f"A gram ({len(gram)} x {len(gram)}) has no Cholesky factor even with a ridge of {damping:g} of its mean "
                "diagonal: it has large negative eigenvalues.",
                "Its statistics are damaged; collect them again.",
            )
        damping = min(1.0, max(_LEAST_RIDGE, 10 * damping))


def _by_columns(
    weight: Tensor,
    factor: Tensor,
    grid: Grid,
    scales: Scales,
    order: Tensor | None = None,
    *,
    dynamic: bool = False,
    energy: Tensor | None = None,
) -> Quantized:
    """Round columns one after the other.

    Args:
        weight: (out, in) float64.
        factor: (in, in) upper triangular, of the columns in `order`.
        scales: of the groups; where `dynamic`, they are found anew as each group's turn comes, for what it has become.
        order: (in,) in which columns are rounded; None: from left to right, as `dynamic` needs it.
        energy: (in,) of the inputs, for which those found anew are fitted; None takes the whole range.
    """
    out_features, count = weight.shape
    width = grid.width(count)
    block = width if dynamic and width > _BLOCK else max(1, _BLOCK // width) * width
    # a column after the other is read and written: they lie in one piece each in the transposed matrices
    columns = weight.T.contiguous()
    if order is not None:
        columns = columns[order]
    groups = [column // width for column in (range(count) if order is None else order.tolist())]
    codes = torch.empty(count, out_features, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(columns)
    steps = scales.steps.T.contiguous()
    zeros = None if scales.zeros is None else scales.zeros.T.contiguous()
    offsets = torch.full_like(steps, grid.middle) if zeros is None else zeros.double()
    # a column is small: what it takes to name its rows costs as much as computing with them, so they are named by the block
    step_of, offset_of = steps.unbind(), offsets.unbind()
    for start in range(0, count, block):
        end = min(start + block, count)
        carried = factor[:start, start:end].T @ errors[:start]  # (block, out): what earlier columns put into these
        nearest = torch.empty_like(carried)  # codes, in float64 for now
        rows = (columns[start:end], carried, factor.diagonal()[start:end], nearest, errors[start:end])
        named = zip(*(part.unbind() for part in rows), strict=True)
        for column, (value, plus, corner, code, error) in enumerate(named, start):
            group = groups[column]
            if dynamic and column % width == 0:
                stop = min(column + width, end)
                own = factor[column:stop, column:stop]
                best = torch.linalg.solve_triangular(own.T, carried[column - start : stop - start], upper=False)
                row, become = replace(grid, group_size=0), (columns[column:stop] + best).T
                found = row.scales(become) if energy is None else row.fitted(become, energy[column:stop])
                steps[group] = found.steps[:, 0]
                if zeros is not None and found.zeros is not None:
                    zeros[group] = offsets[group] = found.zeros[:, 0]
            torch.addcdiv(value, plus, corner, out=code)
            code.div_(step_of[group]).round_().add_(offset_of[group]).clamp_(0, grid.top)
            torch.addcmul(value, code - offset_of[group], step_of[group], value=-1, out=error)
            carried[column - start + 1 :].addr_(factor[column, column + 1 : end], error)
        codes[start:end] = nearest
    if order is not None:
        codes = codes[torch.argsort(order)]
    return Quantized(grid, codes.T.contiguous(), Scales(steps.T.contiguous(), None if zeros is None else zeros.T.contiguous()))


@method("gptq", source="arXiv 2210.17323", needs=["gram"], settings=GptqSettings, options=grid_options, measured=coarsest(3))
def solve(weight: Tensor, stats: TargetStats, settings: GptqSettings) -> OnGrid:
    """The weight (out, in) rounded column by column in the gram's metric."""
    assert stats.group.gram is not None
    ready = compensator(stats.group.gram, settings.damping, settings.act_order)
    quantize = partial(ready.quantize, weight, clip=settings.clip)
    return OnGrid(weight, settings, quantize, Metric.of(stats), ready.damping)
