"""The pruned form: some rows and columns of a weight; which ones need not be stored, since nothing else reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import MODULES, Form, Spec, build_module


@dataclass(frozen=True)
class Pruned(Form):
    """Some rows and columns of a weight, in any form: as they are, or codes on a grid, say.

    Args:
        form: of the (rows kept, columns kept) matrix; carries the bias of its rows.
        rows: (rows kept,) which outputs these are; columns: (columns kept,) which inputs.
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
        """(out, in), zero where rows and columns are gone."""
        left = self.form.dense()
        whole = left.new_zeros(self.shape)
        whole[self.rows[:, None], self.columns] = left
        return whole

    def spec(self) -> Spec:
        return {"kind": self.kind, "rows": len(self.rows), "columns": len(self.columns), "form": self.form.spec()}

    def with_bias(self, bias: Tensor | None) -> Pruned:
        """With the module's own bias (out,), of which the rows that stay are kept."""
        return self if bias is None else replace(self, form=self.form.with_bias(bias[self.rows]))

    def stored(self, dtype: torch.dtype) -> Pruned:
        return replace(self, form=self.form.stored(dtype), rows=self.rows.cpu(), columns=self.columns.cpu())

    @property
    def nbytes(self) -> int:
        return self.form.nbytes


MODULES[Pruned.kind] = lambda spec, n, m, dtype: build_module(spec["form"], spec["columns"], spec["rows"], dtype)
