"""The encoded form with a low-rank correction beside it, which acts on inputs and outputs as they are, not on rotated ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..base import MODULES, SPECS, Form, LowRank, Spec, build_module, matrix_of
from ..product import Product
from .encoded import Encoded, EncodedLinear, EncodedSpec


@dataclass(frozen=True)
class EncodedLowRank(Form):
    """`weight ≈ base + correction`: a matrix in a code and a low-rank form of its error.

    Args:
        base: the matrix in a code; has the bias.
        correction: factors in the checkpoint's dtype, or quantized themselves.
    """

    kind: ClassVar[str] = "encoded+low-rank"
    base: Encoded
    correction: LowRank | Product

    def tensors(self) -> dict[str, Tensor]:
        return self.base.tensors() | {f"correction.{name}": tensor for name, tensor in self.correction.tensors().items()}

    def dense(self) -> Tensor:
        return self.base.dense() + self.correction.dense()

    def spec(self) -> Spec:
        return self.base.spec() | {"kind": self.kind, "correction": self.correction.spec()}

    def with_bias(self, bias: Tensor | None) -> EncodedLowRank:
        return EncodedLowRank(self.base.with_bias(bias), self.correction)

    def stored(self, dtype: torch.dtype) -> EncodedLowRank:
        return EncodedLowRank(self.base.stored(dtype), self.correction.stored(dtype))


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
