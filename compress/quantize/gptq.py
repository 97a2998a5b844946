"""GPTQ: rounds the weight column by column; later columns compensate for the errors of earlier ones.

With the gram factored as C = R Rᵀ, R upper triangular, the output error is ‖(W - Ŵ) R‖². Column j of that product contains the
errors of all earlier columns; the best value to round in column j is the one that cancels them. No inverse is formed.

When to use: at 3 and 4 bits, wherever there is calibration text.

Cost: one Cholesky factor (in, in) per target, and out · in² multiplications for each number of bits. Statistics: a gram.

Source: Frantar et al., GPTQ, arXiv 2210.17323, algorithm 1. Its updates by rows of the inverse's Cholesky factor are the same
in exact arithmetic (R⁻¹ is that factor; the form used here is that of LDLQ in QuIP, arXiv 2307.13304, §3). Differences from
the authors' code: float64; the ridge (1 % of the mean diagonal, as there) grows tenfold where the factorisation fails, and is
reported; inputs that are always zero are rounded to nearest instead of set to zero; with `act_order` (inputs in descending
order of energy) the steps of the groups are those of the original weight, so that a group remains a run of neighbouring
columns and no index is stored; `clip` searches the range of each group, weighted by the energy of its inputs (the `mse` option
of that code weights all inputs equally).
"""

from __future__ import annotations

from collections.abc import Sequence
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

_BLOCK = 64  # columns in a block: errors within it are passed on one by one, those of earlier blocks by one multiplication
_LEAST_RIDGE = 1e-8  # the first ridge that is tried where the recipe asks for none and the gram is singular


class GptqSettings(GridSettings):
    """Settings of `gptq`."""

    damping: float = Field(0.01, ge=0, le=1, description="ridge added to the gram, relative to its mean diagonal")
    act_order: bool = Field(True, description="inputs with the most energy first; steps are then those of the original weight")
    clip: bool = Field(False, description="clip the extremes of a group where finer steps lower the loss; as published: no")


@dataclass(frozen=True)
class Compensator:
    """Rounds weights that read one input; each column compensates for the errors of the columns before it.

    Args:
        factor: (in, in) float64 upper triangular R with R Rᵀ = the damped gram in `order`; None rounds to nearest.
        order: (in,) the columns in the order in which they are rounded; None: from left to right.
        damping: the ridge that was needed, relative to the mean diagonal.
    """

    factor: Tensor | None
    order: Tensor | None
    damping: float

    def quantize(self, weight: Tensor, grid: Grid, clip: bool = False) -> Quantized:
        """The weight (out, in) on the grid.

        Args:
            clip: fit the range of each group, weighted by the energy of its inputs.
        """
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
    """Factor a gram (in, in); a singular one gets more damping.

    Args:
        damping: relative to the mean diagonal; it grows tenfold until the factor exists.
        act_order: round the columns with the largest diagonal entries first.

    Raises:
        NonFiniteError: the gram holds a NaN or an infinity.
        LrcError: it has no factor even with a ridge as large as its mean diagonal, so it is not a gram.
    """
    if not torch.isfinite(gram).all():
        raise NonFiniteError(f"The gram ({len(gram)} x {len(gram)}) is not finite.", "Its statistics overflowed.")
    gram = gram.double()
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:  # all inputs are zero, as of an expert without tokens
        return Compensator(None, None, 0.0)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    ordered = gram if order is None else gram[order][:, order]
    while True:
        damped = ordered + damping * mean * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        # flipping both axes turns the lower triangular Cholesky factor of the flipped matrix into an upper triangular one
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


class _GroupScales:
    """Steps and zeros of a matrix's groups while its columns are rounded.

    Args:
        grid: of the codes.
        scales: the first steps and zeros, (out, groups).
        width: columns in a group.
        renewed: whether a group gets new ones when its turn comes, for its values at that time.
        energy: (in,) of the inputs, to which new scales are fitted; None takes the whole range.
    """

    def __init__(self, grid: Grid, scales: Scales, width: int, renewed: bool, energy: Tensor | None) -> None:
        self.grid, self.width, self.renewed, self._energy = grid, width, renewed, energy
        self._steps = scales.steps.T.contiguous()  # (groups, out), like everything here
        self._zeros = None if scales.zeros is None else scales.zeros.T.contiguous()
        self._offsets = torch.full_like(self._steps, grid.middle) if self._zeros is None else self._zeros.double()
        # a column is small: indexing a row for each one costs as much as computing with it, so all rows are taken out once
        self.step_of, self.offset_of = self._steps.unbind(), self._offsets.unbind()

    def renew(self, group: int, values: Tensor) -> None:
        """New steps and zeros for the values (out, width) of a group."""
        row = replace(self.grid, group_size=0)
        start = group * self.width
        found = row.scales(values) if self._energy is None else row.fitted(values, self._energy[start : start + self.width])
        self._steps[group] = found.steps[:, 0]
        if self._zeros is not None and found.zeros is not None:
            self._zeros[group] = self._offsets[group] = found.zeros[:, 0]

    def scales(self) -> Scales:
        """Steps and zeros as they are now, (out, groups)."""
        return Scales(self._steps.T.contiguous(), None if self._zeros is None else self._zeros.T.contiguous())


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
    """Round the columns one after the other.

    Args:
        weight: (out, in) float64.
        factor: (in, in) upper triangular, for the columns in `order`.
        scales: of the groups; where `dynamic`, each group gets new ones when its turn comes, for its values at that time.
        order: (in,) in which columns are rounded; None: from left to right, which `dynamic` requires.
        energy: (in,) of the inputs, to which new scales are fitted; None takes the whole range.
    """
    out_features, count = weight.shape
    width = grid.width(count)
    block = width if dynamic and width > _BLOCK else max(1, _BLOCK // width) * width
    # whole columns are read and written: in the transposed matrices each one is contiguous
    columns = weight.T.contiguous()
    if order is not None:
        columns = columns[order]
    groups = [column // width for column in (range(count) if order is None else order.tolist())]
    of_groups = _GroupScales(grid, scales, width, dynamic, energy)
    codes = torch.empty(count, out_features, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(columns)
    for start in range(0, count, block):
        end = min(start + block, count)
        carried = factor[:start, start:end].T @ errors[:start]  # (block, out): the errors of earlier blocks in these columns
        own = factor[start:end, start:end]
        codes[start:end] = _round_block(columns[start:end], carried, own, errors[start:end], groups[start:end], of_groups)
    if order is not None:
        codes = codes[torch.argsort(order)]
    return Quantized(grid, codes.T.contiguous(), of_groups.scales())


def _round_block(
    columns: Tensor, carried: Tensor, factor: Tensor, errors: Tensor, groups: Sequence[int], scales: _GroupScales
) -> Tensor:
    """Round the columns of a block one after the other; returns their codes (block, out), in float64.

    Args:
        columns: (block, out) float64.
        carried: (block, out) float64, the errors of earlier columns in these; those of the block's own are added in place.
        factor: (block, block) upper triangular.
        errors: (block, out) float64; the errors of the columns are written to it.
        groups: of each column.
        scales: of all groups.
    """
    step_of, offset_of, top, width = scales.step_of, scales.offset_of, scales.grid.top, scales.width
    nearest = torch.empty_like(carried)
    rows = (columns, carried, factor.diagonal(), nearest, errors)
    each = zip(groups, *(row.unbind() for row in rows), strict=True)
    for column, (group, value, plus, corner, code, error) in enumerate(each):
        if scales.renewed and column % width == 0:
            stop = column + width
            own = factor[column:stop, column:stop]
            best = torch.linalg.solve_triangular(own.T, carried[column:stop], upper=False)
            scales.renew(group, (columns[column:stop] + best).T)
        torch.addcdiv(value, plus, corner, out=code)
        code.div_(step_of[group]).round_().add_(offset_of[group]).clamp_(0, top)
        torch.addcmul(value, code - offset_of[group], step_of[group], value=-1, out=error)
        carried[column + 1 :].addr_(factor[column, column + 1 :], error)
    return nearest


@method("gptq", source="arXiv 2210.17323", needs=["gram"], settings=GptqSettings, options=grid_options, measured=coarsest(3))
def solve(weight: Tensor, stats: TargetStats, settings: GptqSettings) -> OnGrid:
    """The weight (out, in), rounded column by column in the gram's metric."""
    assert stats.group.gram is not None
    ready = compensator(stats.group.gram, settings.damping, settings.act_order)
    quantize = partial(ready.quantize, weight, clip=settings.clip)
    return OnGrid(weight, settings, quantize, Metric.of(stats), ready.damping)
