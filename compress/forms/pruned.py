"""The pruned form: the kept rows and columns of a weight. Their indices are not stored, because loading does not need them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import MODULES, SPECS, Count, Form, FormSpec, Spec, build_module


@dataclass(frozen=True)
class Pruned(Form):
    """The kept rows and columns of a weight, in any form: dense, or quantized.

    Args:
        form: of the (rows kept, columns kept) matrix; has the bias of these rows.
        rows: (rows kept,) indices of the kept outputs.
        columns: (columns kept,) indices of the kept inputs.
        shape: (out, in) of the whole weight.
    """

    kind: ClassVar[str] = "pruned"
    form: Form
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    def tensors(self) -> dict[str, Tensor]:
        return self.form.tensors()

    def dense(self) -> Tensor:
        """(out, in), zero in the pruned rows and columns."""
        left = self.form.dense()
        whole = left.new_zeros(self.shape)
        whole[self.rows[:, None], self.columns] = left
        return whole

    def spec(self) -> Spec:
        return {"kind": self.kind, "rows": len(self.rows), "columns": len(self.columns), "form": self.form.spec()}

    def with_bias(self, bias: Tensor | None) -> Pruned:
        """The same form with the kept rows of the module's own bias (out,)."""
        return self if bias is None else replace(self, form=self.form.with_bias(bias[self.rows]))

    def stored(self, dtype: torch.dtype) -> Pruned:
        return replace(self, form=self.form.stored(dtype), rows=self.rows.cpu(), columns=self.columns.cpu())

    @property
    def nbytes(self) -> int:
        return self.form.nbytes


class PrunedSpec(FormSpec):
    """Spec of the kept rows and columns, whose form is checked when its module is built."""

    rows: Count
    columns: Count
    form: Spec

    def require_fit(self, in_features: int, out_features: int) -> None:
        if self.rows > out_features or self.columns > in_features:
            kept, whole = f"{self.rows} x {self.columns}", f"{out_features} x {in_features}"
            raise ValueError(f"a matrix of {whole} has no {kept} rows and columns to keep")


SPECS[Pruned.kind] = PrunedSpec
MODULES[Pruned.kind] = lambda spec, n, m, dtype: build_module(spec["form"], spec["columns"], spec["rows"], dtype)
