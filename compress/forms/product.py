"""The product form: low-rank factors that are each stored in a form of their own; what a correction beside a base shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from .base import MODULES, SPECS, Count, Form, FormSpec, LowRank, Spec, build_module, matrix_of, require_rank


@dataclass(frozen=True)
class Product(Form):
    """`weight ≈ left · right`, each a form of its own.

    Args:
        left: the form of the (out, rank) factor; has the bias.
        right: the form of the (rank, in) factor.
        rank: inner size.
    """

    kind: ClassVar[str] = "product"
    left: Form
    right: Form
    rank: int

    def tensors(self) -> dict[str, Tensor]:
        guard = next(iter(self.right.tensors().values())).new_empty(0)
        named = {"weight": guard}  # a reader without lrc fails on its shape
        for side, form in (("right", self.right), ("left", self.left)):
            named |= {f"{side}.{name}": tensor for name, tensor in form.tensors().items()}
        return named

    def dense(self) -> Tensor:
        return self.left.dense() @ self.right.dense()

    def spec(self) -> Spec:
        return {"kind": self.kind, "rank": self.rank, "left": self.left.spec(), "right": self.right.spec()}

    def with_bias(self, bias: Tensor | None) -> Product:
        return Product(self.left.with_bias(bias), self.right, self.rank)

    def stored(self, dtype: torch.dtype) -> Product:
        return Product(self.left.stored(dtype), self.right.stored(dtype), self.rank)

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes


class ProductLinear(nn.Module):
    """`y = left(right(x))`; `weight` is an empty guard under the target's original name."""

    def __init__(self, spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self.right = build_module(spec["right"], in_features, spec["rank"], dtype)
        self.left = build_module(spec["left"], spec["rank"], out_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(self.right(x))
        return y

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return matrix_of(self.left, dtype) @ matrix_of(self.right, dtype)


class ProductSpec(FormSpec):
    """Spec of two factors in forms of their own, which are checked when their modules are built."""

    rank: Count
    left: Spec
    right: Spec

    def require_fit(self, in_features: int, out_features: int) -> None:
        require_rank(self.rank, in_features, out_features)


SPECS[Product.kind] = ProductSpec
MODULES[Product.kind] = ProductLinear


B = TypeVar("B", bound=Form)


@dataclass(frozen=True)
class Corrected(Form, Generic[B]):
    """`weight ≈ base + correction`: a matrix of few bits and a low-rank form of its error.

    Args:
        base: the matrix of few bits; has the bias.
        correction: factors in the checkpoint's dtype, or quantized themselves.
    """

    base: B
    correction: LowRank | Product

    def tensors(self) -> dict[str, Tensor]:
        return self.base.tensors() | {f"correction.{name}": tensor for name, tensor in self.correction.tensors().items()}

    def dense(self) -> Tensor:
        return self.base.dense() + self.correction.dense()

    def spec(self) -> Spec:
        return self.base.spec() | {"kind": self.kind, "correction": self.correction.spec()}

    def with_bias(self, bias: Tensor | None) -> Self:
        return replace(self, base=cast(B, self.base.with_bias(bias)))

    def stored(self, dtype: torch.dtype) -> Self:
        return replace(self, base=cast(B, self.base.stored(dtype)), correction=self.correction.stored(dtype))
