"""CALDERA: a quantized weight and quantized low-rank factors, refitted to each other in turn.

W ≈ Q + L R. Each round quantizes the part that the factors do not represent, W - L R, and then finds new factors for the
quantization error, W - Q, in the metric of the input gram. The round with the lowest output error is kept. The factors are the
best rank-k map of W - Q; they are quantized in the order right, left, right, left, each refitted to the other (factors.py).

When to use: at 2 and 3 bits, where the error after one round (`qera`) is large.

Cost: per round one eigenproblem, one pass of GPTQ and `inner_rounds` passes on the factors; some ten times `qera`. With
`rank: null` all of this is repeated for every rank that is asked for. Statistics: a gram per group.

With `code` the base is in a lattice or trellis code of the rotated matrix, with error feedback, as in `trellis`; without, on a
grid. `factor_code` does the same for both factors.

Source: Saha et al., CALDERA, arXiv 2405.18886, algorithms 1 and 2 (2-bit base in the E8P lattice of QuIP#, 4-bit factors in a
lattice, rank 64 to 256, 20 outer and 50 inner iterations). Differences from the authors' code: base and factors have rotations
of their own, which also mix the components of the factors; factors are encoded with error feedback; they start from the
projection form, which needs no inverse of the gram; there are fewer rounds, because the first ones bring most of the gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from ..base import Solution, TargetStats, method
from ..forms.base import LowRank
from ..forms.codes.code import BITS, Code, Kind
from ..forms.codes.corrected import EncodedLowRank
from ..forms.codes.encoded import Encoded
from ..forms.product import Product
from ..forms.quantized import Quantized, QuantizedLowRank
from ..metric import Metric
from ..options import Choice, Shape
from .corrections import CorrectionSettings, best_correction, correction_options
from .encoding.compiled import slow_without_numba
from .factors import Base, FactorBits, InOneCode, OnGrid, quantize_factors
from .gptq import Compensator, compensator
from .rtn import Bits
from .trellis import encoded, encoded_nbytes, seed_of, turned_gram

Form = Quantized | QuantizedLowRank | Encoded | EncodedLowRank
_PATIENCE = 2  # the search ends after so many rounds without improvement


class CalderaSettings(CorrectionSettings):
    """Settings of `caldera`."""

    bits: Bits = Field(2, description="bits per code of the base")
    factor_bits: Literal[16, 8, 4] = Field(4, description="bits of the factors; 16: stored in the checkpoint's own dtype")
    code: Kind | None = Field(None, description="of the base: e8 (2 to 4 bits), trellis or scalar (2 to 5 bits); null: a grid")
    factor_code: Kind | None = Field(None, description="of both factors, as code; null: a grid, or the dtype at 16 bits")
    state_bits: int = Field(10, ge=6, le=16, description="of a trellis, which has 2^state_bits states")
    base: Base = Field("gptq", description="how weight and factors are quantized on a grid")
    rounds: int = Field(10, ge=1, le=100, description="of quantizing and refitting; stops early without improvement")
    inner_rounds: int = Field(5, ge=1, le=100, description="of quantizing both factors, each refitted to the other")
    damping: float = Field(0.01, ge=0, le=1, description="for gptq: ridge added to the gram, relative to its mean diagonal")
    act_order: bool = Field(True, description="for gptq: inputs with the most energy first")
    seed: int = Field(0, ge=0, description="with a code: of the random rotation, with the weight's own bytes")

    @field_validator("code", "factor_code")
    @classmethod
    def _has_the_bits(cls, code: Kind | None, info: ValidationInfo) -> Kind | None:
        key = "bits" if info.field_name == "code" else "factor_bits"
        bits = info.data.get(key)
        if code is not None and bits is not None and bits not in BITS[code]:
            has = ", ".join(map(str, BITS[code]))
            raise ValueError(f"{code} has {has} bits, and {key} is {bits}; null takes a grid instead")
        return code

    def remarks(self) -> list[str]:
        return slow_without_numba() if "trellis" in (self.code, self.factor_code) else []

    @property
    def base_code(self) -> Code | None:
        """The base's code; None: it is on a grid."""
        return None if self.code is None else Code.of(self.code, self.bits, self.state_bits)

    def base_nbytes(self, shape: Shape) -> int:
        """Exact bytes of the base of a matrix of this shape."""
        code = self.base_code
        return super().base_nbytes(shape) if code is None else encoded_nbytes(shape, code)

    @property
    def code_of_factors(self) -> Code | None:
        """The factors' code; None: they are on a grid, or in the checkpoint's dtype."""
        return None if self.factor_code is None else Code.of(self.factor_code, self.factor_bits, self.state_bits)

    def factors_nbytes(self, shape: Shape, rank: int) -> int:
        """Exact bytes of both factors of a matrix of this shape; the rank is at least 1."""
        code = self.code_of_factors
        if code is None:
            return super().factors_nbytes(shape, rank)
        both = replace(shape, out_features=rank), replace(shape, in_features=rank)
        return sum(encoded_nbytes(factor, code) for factor in both)


@dataclass(frozen=True)
class Alternating(Solution):
    """A target that is solved again for every rank that is asked for.

    Args:
        weight: (out, in).
        stats: with the gram.
        settings: of the method.
        quantize: a matrix (out, in) float64 as the base.
        factors: how these are stored in few bits; None: in the checkpoint's dtype.
        ridge: damping of the gram.
    """

    weight: Tensor
    stats: TargetStats
    settings: CalderaSettings
    quantize: Callable[[Tensor], Quantized | Encoded]
    factors: FactorBits | None
    ridge: float = 0.0
    _done: dict[int, tuple[float, Form]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def form(self, choice: Choice) -> Form:
        return self._best(choice)[1]

    def loss(self, choice: Choice) -> float:
        return self._best(choice)[0]

    @property
    def total(self) -> float:
        return Metric.of(self.stats).energy(self.weight)

    @property
    def damping(self) -> float:
        return self.ridge

    def _best(self, choice: Choice) -> tuple[float, Form]:
        if choice.rank is None:
            raise ValueError("a dense target is not solved")
        if choice.rank not in self._done:
            self._done.clear()  # measuring asks for many ranks once each: only the last one is cached
            self._done[choice.rank] = self._search(choice.rank)
        return self._done[choice.rank]

    def _search(self, rank: int) -> tuple[float, Form]:
        best: tuple[float, Form] | None = None
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

    def _rounds(self, rank: int) -> Iterator[tuple[float, Form]]:
        """(loss, form) of each round; for rank 0 only that of the base."""
        weight, metric = self.weight.double(), Metric.of(self.stats)
        base = self.quantize(weight)
        if not rank:
            yield metric.energy(weight - base.dense()), base
            return
        for _ in range(self.settings.rounds):
            error = weight - base.dense()
            factors = self._factors(error, rank, metric)
            correction = factors.dense()
            both = EncodedLowRank(base, factors) if isinstance(base, Encoded) else QuantizedLowRank(base, factors)
            yield metric.energy(error - correction), both
            base = self.quantize(weight - correction)

    def _factors(self, error: Tensor, rank: int, metric: Metric) -> LowRank | Product:
        low = best_correction(error, self.stats).form(Choice(rank=rank))
        if self.factors is None:
            return low
        return quantize_factors(error, low.left, low.right, metric, self.factors, self.settings.inner_rounds)


@method("caldera", source="arXiv 2405.18886", needs=["gram"], settings=CalderaSettings, options=correction_options)
def solve(weight: Tensor, stats: TargetStats, settings: CalderaSettings) -> Alternating:
    """A quantized weight (out, in) and quantized factors in turn; losses are mean squared output errors."""
    gram = stats.group.gram
    assert gram is not None
    grids = settings.code is None or (settings.factor_code is None and settings.factor_grid is not None)
    ready = compensator(gram, settings.damping, settings.act_order) if grids and settings.base == "gptq" else None
    seed = seed_of(weight, settings.seed)
    factors = _factor_bits(settings, ready, seed + 2, gram)
    code, grid = settings.base_code, settings.base_grid
    quantize: Callable[[Tensor], Quantized | Encoded]
    if code is None:
        quantize = partial(ready.quantize, grid=grid) if ready else partial(Quantized.nearest, grid=grid)
        return Alternating(weight, stats, settings, quantize, factors, ready.damping if ready else 0.0)
    feedback = compensator(turned_gram(gram, seed), settings.damping, act_order=False)
    quantize = partial(encoded, code=code, seed=seed, factor=feedback.factor)
    return Alternating(weight, stats, settings, quantize, factors, feedback.damping)


def _factor_bits(settings: CalderaSettings, ready: Compensator | None, seed: int, gram: Tensor) -> FactorBits | None:
    if (code := settings.code_of_factors) is not None:
        return InOneCode.of(code, seed, gram, settings.damping)
    grid = settings.factor_grid
    return None if grid is None else OnGrid(grid, ready)
