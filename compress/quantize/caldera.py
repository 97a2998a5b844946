"""CALDERA: a quantized weight and quantized low-rank factors, found in turn until they fit each other.

W ≈ Q + L R. Each round quantizes what the factors leave over, W - L R, and then finds new factors for what that quantization
lost, W - Q, in the metric of the input gram; the round with the least output error is kept. Factors are the best rank-k map of
W - Q, put on their grid right, left, right, left, each fitted to the other (compress/quantize/factors.py).

When to use: at 2 and 3 bits, where one round (`qera`) leaves much.

Cost: per round one eigenproblem, one sweep of GPTQ and `inner_rounds` of them on the factors; some ten times `qera`. With
`rank: null` all of that again for every rank that is asked about. Statistics: a gram per group.

Source: Saha et al., CALDERA, arXiv 2405.18886, algorithms 1 and 2 (2-bit base, 4-bit factors, rank 64 to 256, 20 outer and 50
inner iterations). Differences from the authors' code: the base is on an integer grid by GPTQ, not on the E8P lattice of QuIP#,
and no Hadamard transform comes before; factors start from the projection form, which needs no inverse of the gram; fewer
rounds, because the first ones bring most of the gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field
from torch import Tensor

from ..base import Solution, TargetStats, method
from ..forms.base import LowRank
from ..forms.product import Product
from ..forms.quantized import Quantized, QuantizedLowRank
from ..metric import Metric
from ..options import Choice
from .corrections import CorrectionSettings, best_correction, correction_options
from .factors import Base, quantize_factors
from .gptq import Compensator, compensator
from .rtn import Bits

_PATIENCE = 2  # rounds without a better one before the search ends


class CalderaSettings(CorrectionSettings):
    """Settings of `caldera`."""

    bits: Bits = Field(2, description="bits of a code of the base")
    factor_bits: Literal[16, 8, 4] = Field(4, description="of the factors; 16: in the checkpoint's own dtype")
    base: Base = Field("gptq", description="how weight and factors are put on their grids")
    rounds: int = Field(10, ge=1, le=100, description="of quantizing and finding factors in turn; fewer where none is better")
    inner_rounds: int = Field(5, ge=1, le=100, description="of quantizing both factors, each fitted to the other")
    damping: float = Field(0.01, ge=0, le=1, description="of gptq: ridge added to the gram, relative to its mean diagonal")
    act_order: bool = Field(True, description="of gptq: inputs with the most energy first")


@dataclass(frozen=True)
class Alternating(Solution):
    """Found anew for every rank that is asked about.

    Args:
        weight: (out, in).
        stats: with the gram.
        settings: how base and factors are found.
        ready: rounds in the gram's metric; None rounds to nearest.
    """

    weight: Tensor
    stats: TargetStats
    settings: CalderaSettings
    ready: Compensator | None
    _done: dict[int, tuple[float, Quantized | QuantizedLowRank]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def form(self, choice: Choice) -> Quantized | QuantizedLowRank:
        return self._best(choice)[1]

    def loss(self, choice: Choice) -> float:
        return self._best(choice)[0]

    @property
    def total(self) -> float:
        return Metric.of(self.stats).energy(self.weight)

    @property
    def damping(self) -> float:
        return self.ready.damping if self.ready else 0.0

    def _best(self, choice: Choice) -> tuple[float, Quantized | QuantizedLowRank]:
        if choice.rank is None:
            raise ValueError("a dense target is not solved")
        if choice.rank not in self._done:
            self._done.clear()  # of many ranks that a survey asks about, the last one is kept
            self._done[choice.rank] = self._search(choice.rank)
        return self._done[choice.rank]

    def _search(self, rank: int) -> tuple[float, Quantized | QuantizedLowRank]:
        best: tuple[float, Quantized | QuantizedLowRank] | None = None
        worse = 0
        for found in self._rounds(rank):
            if best is None or found[0] < best[0]:
                best, worse = found, 0
            else:
                worse += 1
            if worse == _PATIENCE:
                break
        assert best is not None
        return best

    def _rounds(self, rank: int) -> Iterator[tuple[float, Quantized | QuantizedLowRank]]:
        """(loss, form) of each round; without factors, of the base alone."""
        weight, metric = self.weight.double(), Metric.of(self.stats)
        base = self._quantize(weight)
        if not rank:
            yield metric.energy(weight - base.dense()), base
            return
        for _ in range(self.settings.rounds):
            error = weight - base.dense()
            factors = self._factors(error, rank, metric)
            correction = factors.dense()
            yield metric.energy(error - correction), QuantizedLowRank(base, factors)
            base = self._quantize(weight - correction)

    def _quantize(self, weight: Tensor) -> Quantized:
        grid = self.settings.base_grid
        return self.ready.quantize(weight, grid) if self.ready else Quantized.nearest(weight, grid)

    def _factors(self, error: Tensor, rank: int, metric: Metric) -> LowRank | Product:
        low = best_correction(error, self.stats).form(Choice(rank=rank))
        grid = self.settings.factor_grid
        if grid is None:
            return low
        return quantize_factors(error, low.left, low.right, metric, grid, self.ready, self.settings.inner_rounds)


@method("caldera", source="arXiv 2405.18886", needs=["gram"], settings=CalderaSettings, options=correction_options)
def solve(weight: Tensor, stats: TargetStats, settings: CalderaSettings) -> Alternating:
    """A quantized weight (out, in) and quantized factors, alternating; losses are mean squared output errors."""
    assert stats.group.gram is not None
    ready = None
    if settings.base == "gptq":
        ready = compensator(stats.group.gram, settings.damping, settings.act_order)
    return Alternating(weight, stats, settings, ready)
