"""Forms with a factor that several targets share: it is stored once, with the first target of the unit.

Every member stores its own tensor under `<module>.weight` (its left factor, or the values of its codes), whose shape is never
that of the dense weight. The first member, the owner, also stores the shared factor. The spec of each other member names the
owner's module path, and its module reads the owner's tensor when it multiplies. These modules have no copy and no registered
parameter, so that a state dict, an optimizer or a byte count sees the factor once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from .base import MODULES, SPECS, Count, Form, FormSpec, Spec
from .dictionary import Dictionary, DictionaryLinear, DictionarySpec, Pattern, expand, support_nbytes


@dataclass(frozen=True)
class SharedLowRank(Form):
    """`weight ≈ left @ right`, the right factor shared.

    Args:
        left: (out, rank), the target's own.
        right: (rank, in), shared by the unit.
        lends: whether this target stores the right factor.
        owner: if not, the module path of the target that does.
        bias: (out,) or None.
    """

    kind: ClassVar[str] = "shared-low-rank"
    left: Tensor
    right: Tensor
    lends: bool
    owner: str = ""
    bias: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        named = {"weight": self.left.contiguous()}
        if self.lends:
            named["right"] = self.right.contiguous()
        return named if self.bias is None else named | {"bias": self.bias.contiguous()}

    def dense(self) -> Tensor:
        return self.left @ self.right

    def spec(self) -> Spec:
        spec = {"kind": self.kind, "rank": self.right.shape[0], "bias": self.bias is not None}
        return spec if self.lends else spec | {"owner": self.owner}

    def owned_by(self, owner: str) -> SharedLowRank:
        return self if self.lends else replace(self, owner=owner)

    def with_bias(self, bias: Tensor | None) -> SharedLowRank:
        return self if bias is None else replace(self, bias=bias.to(self.left) if self.bias is None else self.bias + bias)

    def stored(self, dtype: torch.dtype) -> SharedLowRank:
        return replace(
            self,
            left=self.left.to("cpu", dtype).contiguous(),
            right=self.right.to("cpu", dtype).contiguous(),
            bias=None if self.bias is None else self.bias.to("cpu", dtype),
        )


@dataclass(frozen=True)
class SharedDictionary(Form):
    """`weight ≈ codes @ atoms`, the atoms shared.

    Args:
        own: the target's codes with all atoms.
        lends: whether this target stores the atoms.
        owner: if not, the module path of the target that does.
    """

    kind: ClassVar[str] = "shared-dictionary"
    own: Dictionary
    lends: bool
    owner: str = ""

    def tensors(self) -> dict[str, Tensor]:
        held = self.own.tensors()
        named = {"weight": held["values"], "support": held["support"]}
        if self.lends:
            named["dictionary"] = held["weight"]
        return named if "bias" not in held else named | {"bias": held["bias"]}

    def dense(self) -> Tensor:
        return self.own.dense()

    def spec(self) -> Spec:
        spec = self.own.spec() | {"kind": self.kind}
        return spec if self.lends else spec | {"owner": self.owner}

    def owned_by(self, owner: str) -> SharedDictionary:
        return self if self.lends else replace(self, owner=owner)

    def with_bias(self, bias: Tensor | None) -> SharedDictionary:
        return replace(self, own=self.own.with_bias(bias))

    def stored(self, dtype: torch.dtype) -> SharedDictionary:
        return replace(self, own=self.own.stored(dtype))


class Borrowing:
    """A module that multiplies by a shared tensor: its own, or that of the module that it is linked to (the lender)."""

    def _share(self, owner: str | None, shared: str, size: tuple[int, int]) -> None:
        """Say where the shared tensor is.

        Args:
            owner: module path of the lender; None for the lender itself.
            shared: name of the tensor in the lender.
            size: its shape.
        """
        self.owner, self.shared_name, self.shared_size = owner, shared, size

    def link(self, lender: Borrowing) -> None:
        """Read the shared tensor from this module from now on."""
        self.__dict__["_lender"] = lender  # not by setattr: nn.Module would register the lender a second time

    def shared(self, device: torch.device) -> Tensor:
        """The shared tensor on this device.

        Raises:
            CheckpointError: the lender's weights are not in memory.
        """
        lender = self if self.owner is None else self.__dict__["_lender"]
        tensor: Tensor = getattr(lender, self.shared_name)
        if tensor.is_meta:  # accelerate has moved the weights of a module that is not running, and knows where to
            kept = getattr(getattr(lender, "_hf_hook", None), "weights_map", None)
            if kept is None:
                raise CheckpointError(
                    f"The factor that a compressed matrix shares with '{self.owner}' is not in memory.",
                    "Load the whole model: from_pretrained, with a device_map where it is larger than one device.",
                )
            tensor = kept[self.shared_name]
        return tensor.to(device)


class SharedLowRankLinear(Borrowing, nn.Module):
    """`y = weight (right x) + bias`; `weight` is the target's own left factor (out, rank), `right` (rank, in) is shared."""

    def __init__(self, spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, int(spec["rank"])
        self._share(spec.get("owner"), "right", (self.rank, in_features))
        self.weight = nn.Parameter(torch.empty(out_features, self.rank, dtype=dtype))
        if self.owner is None:
            self.right = nn.Parameter(torch.empty(self.rank, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if spec["bias"] else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.shared(x.device)), self.weight, self.bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return self.weight.to(dtype) @ self.shared(self.weight.device).to(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"owner={self.owner}, bias={self.bias is not None}"
        )


class SharedDictionaryLinear(Borrowing, DictionaryLinear):
    """`y = codes (dictionary x) + bias`; `weight` holds the values of the target's own codes, the atoms (k, in) are shared."""

    def __init__(self, spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.atoms = in_features, out_features, int(spec["atoms"])
        self.pattern: Pattern = spec["pattern"]
        self._share(spec.get("owner"), "dictionary", (self.atoms, in_features))
        self.weight = nn.Parameter(torch.empty(spec["nonzeros"], dtype=dtype))
        support = torch.empty(support_nbytes(out_features, self.atoms), dtype=torch.uint8)
        self.support = nn.Parameter(support, requires_grad=False)
        if self.owner is None:
            self.dictionary = nn.Parameter(torch.empty(self.atoms, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if spec["bias"] else None
        self._starts = self._index = None

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The nonzero codes, row after row."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.of_coefficients(nn.functional.linear(x, self.shared(x.device)))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return expand(self.values.to(dtype), self.mask()) @ self.shared(self.weight.device).to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, owner={self.owner}"


class SharedLowRankSpec(FormSpec):
    """Spec of a left factor and a right one that several targets share; without an owner the target stores both."""

    rank: Count
    bias: bool
    owner: str | None = None

    def require_fit(self, in_features: int, out_features: int) -> None:
        if self.rank > in_features:  # the outputs of all members together may have that rank
            raise ValueError(f"rank {self.rank} is more than {in_features} inputs can have")


class SharedDictionarySpec(DictionarySpec):
    """Spec of codes whose atoms several targets share; without an owner the target stores the atoms."""

    owner: str | None = None


SPECS[SharedLowRank.kind], SPECS[SharedDictionary.kind] = SharedLowRankSpec, SharedDictionarySpec
MODULES[SharedLowRank.kind] = SharedLowRankLinear
MODULES[SharedDictionary.kind] = SharedDictionaryLinear


def link(specs: Mapping[str, Spec], module_at: Callable[[str], nn.Module]) -> None:
    """Link every module that shares another module's factor to that module.

    Args:
        specs: module path -> spec; modules whose spec names no owner need no link.
        module_at: module path -> the module; raises AttributeError where there is none.

    Raises:
        CheckpointError: the owner is missing, or its factor has another shape or kind.
    """
    for name, spec in specs.items():
        if (owner := spec.get("owner")) is None:
            continue
        borrower = module_at(name)
        try:
            lender: object = module_at(owner)
        except AttributeError:
            lender = None
        assert isinstance(borrower, Borrowing)
        if type(lender) is not type(borrower) or lender.owner is not None or lender.shared_size != borrower.shared_size:
            raise CheckpointError(
                f"The checkpoint's quantization_config does not fit this model: '{name}' shares a factor of "
                f"{' x '.join(map(str, borrower.shared_size))} with '{owner}', which does not hold one.",
                "Its config.json was changed; write the artifact again.",
            )
        borrower.link(lender)


def lenders(module: nn.Module, path: str) -> set[str]:
    """Paths of the modules outside `path` whose factors this module reads.

    Args:
        module: a layer, say.
        path: the module's own path.
    """
    owners = {part.owner for part in module.modules() if isinstance(part, Borrowing) and part.owner is not None}
    return {owner for owner in owners if not owner.startswith(path + ".")}
