"""Round to nearest: every weight is rounded to the nearest point of its grid, without calibration data.

When to use: at 8 bits, where nothing better is needed; at 4 bits as the baseline for `gptq` and `qera`.

Cost: negligible. Needs no statistics. The loss is the output error where the input gram was collected, else the weight error.

Source: the common baseline, as in Frantar et al., GPTQ, arXiv 2210.17323, §4. compress/forms/grids.py describes
the grids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from ..base import Settings, Solution, TargetStats, method
from ..forms.grids import BITS, Grid
from ..forms.quantized import Quantized
from ..metric import Metric
from ..options import Choice, Option, Shape

Bits = Literal[2, 3, 4, 5, 6, 8]


class OneGridSettings(Settings):
    """Settings of a grid without its bits."""

    group_size: int = Field(64, ge=0, description="values along the input that share a step size; 0: a whole row")
    grid: Literal["int", "mxint"] = Field("int", description="int: steps in the checkpoint's dtype; mxint: powers of two")
    symmetric: bool | None = Field(
        None, description="store no zero points; null: false on int, true on mxint (always symmetric)"
    )

    @field_validator("symmetric")
    @classmethod
    def _mxint_is_symmetric(cls, symmetric: bool | None, info: ValidationInfo) -> bool | None:
        if symmetric is False and info.data.get("grid") == "mxint":
            raise ValueError("an mxint grid is symmetric; leave this out, or take grid: int")
        return symmetric

    def of(self, bits: int) -> Grid:
        """The grid with this many bits."""
        return Grid(bits, self.group_size, self.grid, self.grid == "mxint" or bool(self.symmetric))


class GridSettings(OneGridSettings):
    """Settings of `rtn`."""

    sized_by: ClassVar[str] = "bits"

    bits: Bits | None = Field(4, description="bits per code; null: as many as the budget allows")


@dataclass(frozen=True)
class OnGrid(Solution):
    """A target that is quantized once for each number of bits that is asked for.

    Args:
        weight: (out, in).
        settings: of the grid.
        quantize: returns the weight on a grid.
        metric: in which the loss is measured.
        ridge: damping of the gram that `quantize` uses.
    """

    weight: Tensor
    settings: GridSettings
    quantize: Callable[[Grid], Quantized]
    metric: Metric
    ridge: float = 0.0
    _done: dict[int, Quantized] = field(default_factory=dict, init=False, repr=False, compare=False)

    def form(self, choice: Choice) -> Quantized:
        if choice.bits is None:
            raise ValueError("a dense target is not quantized")
        if choice.bits not in self._done:
            self._done[choice.bits] = self.quantize(self.settings.of(choice.bits))
        return self._done[choice.bits]

    def loss(self, choice: Choice) -> float:
        return self.metric.energy(self.weight.double() - self.form(choice).dense())

    @property
    def total(self) -> float:
        return self.metric.energy(self.weight)

    @property
    def damping(self) -> float:
        return self.ridge


def grid_options(shape: Shape, settings: GridSettings, multiple: int) -> list[Option]:
    """One option for the bits of the settings, or one for each number of bits, where the form is smaller than the matrix."""
    wanted = BITS if settings.bits is None else (settings.bits,)
    options = [
        Option(Choice(bits=bits), settings.of(bits).nbytes(shape.out_features, shape.in_features, shape.element))
        for bits in wanted
    ]
    return [option for option in options if option.nbytes < shape.nbytes]


@method("rtn", source="arXiv 2210.17323 §4", settings=GridSettings, options=grid_options, power=2)
def solve(weight: Tensor, stats: TargetStats, settings: GridSettings) -> OnGrid:
    """The weight (out, in), rounded to nearest."""
    return OnGrid(weight, settings, lambda grid: Quantized.nearest(weight, grid), Metric.of(stats))
