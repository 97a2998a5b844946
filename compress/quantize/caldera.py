"""CALDERA: a quantized weight and quantized low-rank factors, refitted to each other in turn.

W ≈ Q + L R. Each round quantizes the part that the factors do not represent, W - L R, and then finds new factors for the
quantization error, W - Q, in the metric of the input gram. The round with the lowest output error is kept. The factors are the
best rank-k map of W - Q; they are quantized in the order right, left, right, left, each refitted to the other (factors.py).

When to use: at 2 and 3 bits, where the error after one round (`qera`) is large.

Cost: per round one eigenproblem, one pass of GPTQ and `inner_rounds` passes on the factors; some ten times `qera`. With
`rank: null` all of this is repeated for every rank that is asked for. Statistics: a gram per group.

Source: Saha et al., CALDERA, arXiv 2405.18886, algorithms 1 and 2 (2-bit base, 4-bit factors, rank 64 to 256, 20 outer and 50
inner iterations). Differences from the authors' code: the base is quantized by GPTQ on an integer grid, not on the E8P lattice
of QuIP#, and without a Hadamard transform before; the factors start from the projection form, which needs no inverse of the
gram; there are fewer rounds, because the first ones bring most of the gain.
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

_PATIENCE = 2  # the search ends after so many rounds without improvement


class CalderaSettings(CorrectionSettings):
    """Settings of `caldera`."""

    bits: Bits = Field(2, description="bits per code of the base")
    factor_bits: Literal[16, 8, 4] = Field(4, description="bits of the factors; 16: stored in the checkpoint's own dtype")
    base: Base = Field("gptq", description="how weight and factors are quantized")
    rounds: int = Field(10, ge=1, le=100, description="of quantizing and refitting; stops early without improvement")
    inner_rounds: int = Field(5, ge=1, le=100, description="of quantizing both factors, each refitted to the other")
    damping: float = Field(0.01, ge=0, le=1, description="for gptq: ridge added to the gram, relative to its mean diagonal")
    act_order: bool = Field(True, description="for gptq: inputs with the most energy first")


@dataclass(frozen=True)
class Alternating(Solution):
    """A target that is solved again for every rank that is asked for.

    Args:
        weight: (out, in).
        stats: with the gram.
        settings: of the method.
        ready: GPTQ in the gram's metric; None rounds to nearest.
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
            self._done.clear()  # measuring asks for many ranks once each: only the last one is cached
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
        """(loss, form) of each round; for rank 0 only that of the base."""
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
    """A quantized weight (out, in) and quantized factors in turn; losses are mean squared output errors."""
    assert stats.group.gram is not None
    ready = None
    if settings.base == "gptq":
        ready = compensator(stats.group.gram, settings.damping, settings.act_order)
    return Alternating(weight, stats, settings, ready)
