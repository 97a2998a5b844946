"""The form of a pruned feed-forward: the same matrix with fewer rows or columns.

The targets of one feed-forward lose the same inner channels: those that make them (gate, up) lose rows and biases, the one that
reads them (down) loses columns. Which channels stay need not be stored: nobody else sees them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .forms import MODULES, Form, Spec


@dataclass(frozen=True)
class Pruned(Form):
    """Some rows and columns of a weight.

    Args:
        weight: (rows kept, columns kept).
        rows: (rows kept,) which outputs these are; columns: (columns kept,) which inputs.
        shape: (out, in) of the whole weight.
        bias: (rows kept,) or None.
    """

    kind: ClassVar[str] = "pruned"
    weight: Tensor
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        named = {"weight": self.weight.contiguous()}
        return named if self.bias is None else named | {"bias": self.bias.contiguous()}

    def dense(self) -> Tensor:
        """(out, in), zero where rows and columns are gone."""
        whole = self.weight.new_zeros(self.shape)
        whole[self.rows[:, None], self.columns] = self.weight
        return whole

    def spec(self) -> Spec:
        rows, columns = self.weight.shape
        return {"kind": self.kind, "rows": rows, "columns": columns, "bias": self.bias is not None}

    def with_bias(self, bias: Tensor | None) -> Pruned:
        """With the module's own bias (out,), of which the rows that stay are kept."""
        if bias is None:
            return self
        kept = bias.to(self.weight)[self.rows]
        return replace(self, bias=kept if self.bias is None else self.bias + kept)

    def stored(self, dtype: torch.dtype) -> Pruned:
        return replace(
            self,
            weight=self.weight.to("cpu", dtype).contiguous(),
            rows=self.rows.cpu(),
            columns=self.columns.cpu(),
            bias=None if self.bias is None else self.bias.to("cpu", dtype),
        )


class PrunedLinear(nn.Linear):
    """A linear module with the rows and columns that are left."""

    def __init__(self, spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(spec["columns"], spec["rows"], spec["bias"], dtype=dtype)

    def dense(self) -> Tensor:
        """The (rows, columns) matrix that this module multiplies by."""
        return self.weight


MODULES[Pruned.kind] = PrunedLinear
