"""The encoded form with a low-rank correction beside it, which acts on inputs and outputs as they are, not on rotated ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..base import MODULES, SPECS, Spec, build_module, matrix_of
from ..product import Corrected
from .encoded import Encoded, EncodedLinear, EncodedSpec


class EncodedLowRank(Corrected[Encoded]):
    """A matrix in a code with a correction."""

    kind: ClassVar[str] = "encoded+low-rank"


class EncodedLowRankLinear(EncodedLinear):
    """`y = weight x + correction(x) + bias`."""

    def __init__(self, spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec, in_features, out_features, dtype)
        self.correction = build_module(spec["correction"], in_features, out_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = super().forward(x) + self.correction(x)
        return total

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return super().matrix(dtype) + matrix_of(self.correction, dtype)


class EncodedLowRankSpec(EncodedSpec):
    """Spec of codes and their correction, which is checked when its module is built."""

    correction: Spec


SPECS[EncodedLowRank.kind] = EncodedLowRankSpec
MODULES[EncodedLowRank.kind] = EncodedLowRankLinear
