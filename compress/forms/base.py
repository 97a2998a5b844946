"""Forms: how a target is stored, and how to multiply by it.

A form is a value: named tensors, their bytes, and the dense matrix that they represent. Its module multiplies by the same
tensors inside a loaded model. The first tensor of every form but the dense one is stored under the target's original name
`<module>.weight`, so that a reader without lrc fails on its shape instead of filling in random weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..registry import import_all
from .kernels import low_rank

Spec = dict[str, Any]


class Form(ABC):
    """One target's weight as it is stored."""

    kind: ClassVar[str]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Suffix after the target's name -> tensor to store."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The (out, in) matrix that this form represents, in the dtype of its tensors."""

    @abstractmethod
    def spec(self) -> Spec:
        """What a loader must know before it opens a file, as JSON: `kind` and sizes."""

    @abstractmethod
    def with_bias(self, bias: Tensor | None) -> Form:
        """The same form with the module's own bias (out,) added to the bias that the method made, if any."""

    @abstractmethod
    def stored(self, dtype: torch.dtype) -> Form:
        """The same form as it is written to disk: floating-point tensors rounded to `dtype`, on the CPU."""

    def owned_by(self, owner: str) -> Form:
        """The same form as a member of a unit whose shared factor is stored by the target with this module path."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes on disk without the bias, which is never compressed."""
        return sum(t.numel() * t.element_size() for name, t in self.tensors().items() if name != "bias")


@dataclass(frozen=True)
class Dense(Form):
    """An uncompressed weight.

    Args:
        weight: (out, in).
        bias: (out,) or None.
    """

    kind: ClassVar[str] = "dense"
    weight: Tensor
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        named = {"weight": self.weight.contiguous()}
        return named if self.bias is None else named | {"bias": self.bias.contiguous()}

    def dense(self) -> Tensor:
        return self.weight

    def spec(self) -> Spec:
        return {"kind": self.kind, "bias": self.bias is not None}

    def with_bias(self, bias: Tensor | None) -> Dense:
        if bias is None:
            return self
        return replace(self, bias=bias.to(self.weight) if self.bias is None else self.bias + bias.to(self.bias))

    def stored(self, dtype: torch.dtype) -> Dense:
        bias = None if self.bias is None else self.bias.to("cpu", dtype)
        return replace(self, weight=self.weight.to("cpu", dtype).contiguous(), bias=bias)


@dataclass(frozen=True)
class LowRank(Form):
    """`weight ≈ left @ right`.

    Args:
        left: (out, rank).
        right: (rank, in).
        bias: (out,) or None.
    """

    kind: ClassVar[str] = "low-rank"
    left: Tensor
    right: Tensor
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        named = {"weight": self.right.contiguous(), "left": self.left.contiguous()}
        return named if self.bias is None else named | {"bias": self.bias.contiguous()}

    def dense(self) -> Tensor:
        return self.left @ self.right

    def spec(self) -> Spec:
        return {"kind": self.kind, "rank": self.right.shape[0], "bias": self.bias is not None}

    def with_bias(self, bias: Tensor | None) -> LowRank:
        if bias is None:
            return self
        return LowRank(self.left, self.right, bias.to(self.left) if self.bias is None else self.bias + bias.to(self.bias))

    def stored(self, dtype: torch.dtype) -> LowRank:
        bias = None if self.bias is None else self.bias.to("cpu", dtype)
        return LowRank(self.left.to("cpu", dtype).contiguous(), self.right.to("cpu", dtype).contiguous(), bias)


class LowRankLinear(nn.Module):
    """`y = left (weight x) + bias`, where `weight` is the form's right factor, (rank, in), and left is (out, rank)."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(rank, in_features, dtype=dtype))
        self.left = nn.Parameter(torch.empty(out_features, rank, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if (y := low_rank(self, x)) is not None:
            return y
        return nn.functional.linear(nn.functional.linear(x, self.weight), self.left, self.bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return self.left.to(dtype) @ self.weight.to(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"
        )


Count = Annotated[int, Field(ge=1, lt=1 << 31)]


class FormSpec(BaseModel):
    """The schema of a form's spec. Specs come from config.json, which anyone may have written: types are strict, and keys that
    the form does not have are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: str

    def require_fit(self, in_features: int, out_features: int) -> None:
        """Compare the sizes with those of the matrix that the form stands for.

        Raises:
            ValueError: no matrix of this shape can have them.
        """


class DenseSpec(FormSpec):
    """Spec of a dense matrix."""

    bias: bool


class LowRankSpec(FormSpec):
    """Spec of two factors."""

    rank: Count
    bias: bool

    def require_fit(self, in_features: int, out_features: int) -> None:
        require_rank(self.rank, in_features, out_features)


def require_rank(rank: int, in_features: int, out_features: int) -> None:
    """Refuse a rank that no matrix of this shape has.

    Raises:
        ValueError: it is larger than the shorter side.
    """
    if rank > min(in_features, out_features):
        raise ValueError(f"rank {rank} is more than a matrix of {out_features} x {in_features} can have")


# kind -> schema of its spec; a file that defines a form adds its entry on import, as for `MODULES`
SPECS: dict[str, type[FormSpec]] = {LowRank.kind: LowRankSpec, Dense.kind: DenseSpec}

# kind -> (spec, in_features, out_features, dtype) -> an empty module whose state dict matches the form's tensors; a file that
# defines a form adds its entry on import
MODULES: dict[str, Callable[[Spec, int, int, torch.dtype | None], nn.Module]] = {
    LowRank.kind: lambda spec, n, m, dtype: LowRankLinear(n, m, spec["rank"], spec["bias"], dtype),
    Dense.kind: lambda spec, n, m, dtype: nn.Linear(n, m, spec["bias"], dtype=dtype),
}


def build_module(spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> nn.Module:
    """The empty module for a form's `spec`; create it under `torch.device("meta")` where weights are loaded later.

    Files of forms are imported when a kind is not known yet; no method is imported.

    Raises:
        KeyError: no form has this kind.
        ValueError: the spec is none of its kind's, or its sizes do not fit the matrix.
    """
    if not isinstance(spec, dict):
        raise ValueError(f"the spec of a form is a mapping, not {type(spec).__name__}")
    kind = spec["kind"]
    if not isinstance(kind, str):
        raise ValueError(f"the kind of a form is a word, not {type(kind).__name__}")
    if kind not in MODULES:
        import_all(__package__ or "lrc.compress.forms")
    SPECS[kind].model_validate(spec).require_fit(in_features, out_features)
    return MODULES[kind](spec, in_features, out_features, dtype)


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Set these tensors as the parameters of a module, without a copy; the module may be on any device."""
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module.requires_grad_(False)


def is_form_module(module: nn.Module) -> bool:
    """Whether a module multiplies by a form of lrc's; all of them are defined in this folder."""
    return type(module).__module__.startswith(f"{__package__}.")


def kinds_in(spec: object) -> set[str]:
    """The kinds of a form and of the forms in it; grids and codes have kinds of their own, which are not forms."""
    if not isinstance(spec, dict) or "kind" not in spec:
        return set()
    return {str(spec["kind"])}.union(*(kinds_in(inner) for key, inner in spec.items() if key not in {"grid", "code"}))


def matrix_of(module: Any, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix that a module multiplies by, in `dtype`: of a form's module, or of an `nn.Linear` or `Conv1D`."""
    matrix: Tensor = module.matrix(dtype) if is_form_module(module) else linear_weight(module).detach().to(dtype)
    return matrix


def bias_of(module: Any) -> Tensor | None:
    """The bias of a form's module, None where it has none; a product has it in its left factor."""
    bias, left = getattr(module, "bias", None), getattr(module, "left", None)
    if bias is None and isinstance(left, nn.Module):
        bias = getattr(left, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(out, in) of an `nn.Linear` or of transformers' `Conv1D` (GPT-2, weight stored as (in, out)); None for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"):
        return module.nf, module.nx
    return None


def linear_weight(module: Any) -> Tensor:
    """A view of the weight of such a module as (out, in)."""
    weight: Tensor = module.weight
    return weight if isinstance(module, nn.Linear) else weight.T
