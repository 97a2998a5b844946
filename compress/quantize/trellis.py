"""Trellis codes: a rotated weight, 256 values at a time along the best path of a trellis; 1 to 6 bits and next to no scales.

A random rotation of both sides makes every weight look like draws from one Gaussian (incoherence). For these a trellis loses
little more than any code must: 1.18 times the bound at 2 bits with 2^12 states, where the best grid of single values loses 1.9
times. Errors are passed on from block to block of 16 columns in the metric of the input gram, as in `gptq`.

When to use: at 2 to 4 bits, wherever there is calibration text. `code: e8` (vectors of eight in a lattice) and `scalar` (single
values) lose more at the same bytes.

Cost: six operations for each of 2^state_bits states and each weight; `state_bits: 10` encodes three times as fast as 12 and
has 6 % more distortion at 2 bits, 13 % at 4. numba (`pip install lrc[compiled]`) makes it ten times as fast on a CPU. A
product rotates its input and output and computes the weights from their codes. Statistics: a gram.

Source: Tseng et al., QTIP, arXiv 2406.11235 (bitshift trellis, tail-biting, block LDLQ), and QuIP#, arXiv 2402.04396
(incoherence and E8P). Differences from the authors' code: 2^12 states instead of 2^16; the factor that a state's value comes
from (their 1MAD with another one); one scale for 16 columns; the rotation's factor for sizes that are no power of two
(compress/forms/codes/rotation.py); float64 around the code; no tuning between layers: take `propagate: compressed`, and
`refine` for what is left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from ...errors import NonFiniteError
from ..base import Settings, Solution, TargetStats, method
from ..forms.codes.code import BITS, SIDE, STATE_BITS, Code, Kind
from ..forms.codes.encoded import Encoded
from ..forms.codes.rotation import rotate, rotate_both
from ..metric import Metric
from ..options import Choice, Option, Shape, coarsest
from .encoding.compiled import slow_without_numba
from .encoding.feedback import encode_columns
from .gptq import compensator


class CodeSettings(Settings):
    """A code, and what is done to a weight before it is encoded."""

    sized_by: ClassVar[str] = "bits"

    code: Kind = Field("trellis", description="trellis; e8: vectors of eight in a lattice (2 to 4 bits); scalar: single values")
    bits: Literal[1, 2, 3, 4, 5, 6] | None = Field(3, description="bits per weight; null: as many as the budget allows")
    state_bits: int = Field(
        12,
        ge=STATE_BITS[0],
        le=STATE_BITS[-1],
        description="of a trellis with 2^state_bits states: each one more doubles the time",
    )
    rotate: bool = Field(True, description="rotate both sides at random, which makes the weight fit for a code with one scale")
    gains: bool = Field(False, description="a factor for each output, fitted and then trained by `refine`; 16 bits each")
    damping: float = Field(0.01, ge=0, le=1, description="ridge added to the gram, relative to its mean diagonal")
    seed: int = Field(0, ge=0, description="of the random rotation, with the weight's own bytes")

    @field_validator("bits")
    @classmethod
    def _bits_of_the_code(cls, bits: int | None, info: ValidationInfo) -> int | None:
        kind = info.data.get("code", "trellis")
        if bits is not None and bits not in BITS[kind]:
            raise ValueError(f"code: {kind} has {', '.join(map(str, BITS[kind]))} bits, not {bits}")
        return bits

    def remarks(self) -> list[str]:
        return slow_without_numba() if self.code == "trellis" else []

    def of(self, bits: int) -> Code:
        """The code with this many bits."""
        return Code.of(self.code, bits, self.state_bits)


class TrellisSettings(CodeSettings):
    """Settings of `trellis`."""

    feedback: bool = Field(True, description="later columns compensate for the errors of earlier ones, in the gram's metric")


@dataclass(frozen=True)
class InCode(Solution):
    """A target that is encoded once for each number of bits that is asked for.

    Args:
        weight: (out, in).
        settings: of the method.
        metric: of the inputs.
        encode: the weight in a code: codes and scales as `Encoded` has them.
        seed: of the rotation; None: none.
        ridge: damping of the gram.
        outputs: (out, out) float64, half of the metric of the outputs; None: the identity.
    """

    weight: Tensor
    settings: CodeSettings
    metric: Metric
    encode: Callable[[Code], tuple[Tensor, Tensor]]
    seed: int | None
    ridge: float
    outputs: Tensor | None = None
    _done: dict[int, Encoded] = field(default_factory=dict, init=False, repr=False, compare=False)

    def form(self, choice: Choice) -> Encoded:
        if choice.bits is None:
            raise ValueError("a dense target is not encoded")
        if choice.bits not in self._done:
            code = self.settings.of(choice.bits)
            codes, scales = self.encode(code)
            rows, columns = self.weight.shape
            form = Encoded(code, codes, scales, (rows, columns), self.seed)
            self._done[choice.bits] = replace(form, gains=self._gains(form.dense())) if self.settings.gains else form
        return self._done[choice.bits]

    def loss(self, choice: Choice) -> float:
        return self._energy(self.weight.double() - self.form(choice).dense())

    @property
    def total(self) -> float:
        return self._energy(self.weight.double())

    def _energy(self, error: Tensor) -> float:
        if self.outputs is None:
            return self.metric.energy(error)
        return max(0.0, float(((self.outputs @ self.metric.times(error)) * error).sum()))

    def _gains(self, dense: Tensor) -> Tensor:
        """(out,) what each output is multiplied by for the least squared error; 1 where there is nothing to fit."""
        seen = self.metric.times(dense)
        own, shared = (seen * dense).sum(1), (seen * self.weight.double()).sum(1)
        return torch.where((own > 0) & (shared > 0), shared / own, 1.0)

    @property
    def damping(self) -> float:
        return self.ridge


def encoded_nbytes(shape: Shape, code: Code, gains: bool = False) -> int:
    """Exact bytes of a matrix of this shape in a code: whole tiles of 16 x 16, a scale for 16 columns, a gain for a row."""
    rows, columns = -(-shape.out_features // SIDE), -(-shape.in_features // SIDE)
    return columns * (rows * code.nbytes + shape.element) + gains * shape.out_features * shape.element


def code_options(shape: Shape, settings: CodeSettings, multiple: int) -> list[Option]:
    """One option for the bits of the settings, or one for each number of bits, where the form is smaller than the matrix."""
    wanted = BITS[settings.code] if settings.bits is None else (settings.bits,)
    options = [Option(Choice(bits=bits), encoded_nbytes(shape, settings.of(bits), settings.gains)) for bits in wanted]
    return [option for option in options if option.nbytes < shape.nbytes]


def seed_of(weight: Tensor, seed: int) -> int:
    """A seed below 2^30 from the settings' and the weight's bytes: each target has its own, whatever is solved beside it."""
    content = weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    digest = hashlib.sha256(content + seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:4], "little") >> 2


def turned(weight: Tensor, seed: int | None) -> Tensor:
    """The weight (out, in) to encode, in float64: rotated on both sides, or as it is without a seed."""
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise NonFiniteError(f"{bad} of {weight.numel()} values to encode are NaN or infinite.", "Check the model's weights.")
    return weight.double() if seed is None else rotate_both(weight.double(), seed)


def turned_gram(gram: Tensor, seed: int | None) -> Tensor:
    """A gram (n, n) of what is rotated with this seed, in float64."""
    return gram.double() if seed is None else rotate(rotate(gram.double(), seed).T, seed)


def encoded(matrix: Tensor, code: Code, seed: int | None, factor: Tensor | None) -> Encoded:
    """A matrix (out, in) in a code, rotated with this seed, with feedback by `factor`, see `encode_columns`."""
    codes, scales = encode_columns(turned(matrix, seed), factor, code)
    return Encoded(code, codes, scales, (len(matrix), matrix.shape[1]), seed)


@method(
    "trellis",
    source="arXiv 2406.11235",
    needs=["gram"],
    settings=TrellisSettings,
    options=code_options,
    measured=coarsest(3),
    power=2,
)
def solve(weight: Tensor, stats: TargetStats, settings: TrellisSettings) -> InCode:
    """The weight (out, in) in a code, block by block of columns in the gram's metric."""
    gram = stats.group.gram
    assert gram is not None
    seed = seed_of(weight, settings.seed) if settings.rotate else None
    wanted, factor, ridge = turned(weight, seed), None, 0.0
    if settings.feedback:
        ready = compensator(turned_gram(gram, seed), settings.damping, act_order=False)
        factor, ridge = ready.factor, ready.damping
    return InCode(weight, settings, Metric.of(stats), partial(encode_columns, wanted, factor), seed, ridge)
