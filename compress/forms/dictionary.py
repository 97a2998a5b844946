"""The dictionary form: every row of the weight is a sum of a few of the target's atoms.

`weight ≈ codes @ atoms` with few nonzero codes in each row (for an input x: y = codes (atoms x)). The file holds the atoms, the
nonzero values row by row, and their support, which says where the nonzero values are: one bit for each entry of the codes, or,
for the 2:4 pattern, the two positions of each group of four in 2 bits each, which takes as many bytes. The methods in
compress/dictionary find codes and atoms.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..options import Shape
from .base import MODULES, SPECS, Count, Form, FormSpec, Spec
from .kernels import sparse

Pattern = Literal["free", "2:4"]
# inputs of at most this many tokens are multiplied by gathering; benchmarks/cost/dictionary.py measures where that is faster
GATHER_UP_TO = 512
_ALIGN = 8  # the support is padded to this many bytes, so that sizes in bytes are whole numbers of any dtype


def support_nbytes(out_features: int, atoms: int) -> int:
    """Bytes of the support of (out, atoms) codes; equal for both patterns."""
    return -(-out_features * atoms // (8 * _ALIGN)) * _ALIGN


def nbytes(shape: Shape, atoms: int, nonzeros: int) -> int:
    """Bytes on disk with this many atoms and this many nonzero codes in the whole target."""
    return (atoms * shape.in_features + nonzeros) * shape.element + support_nbytes(shape.out_features, atoms)


def pack(mask: Tensor, pattern: Pattern) -> Tensor:
    """The support of codes as stored: (bytes,) uint8; bit i of byte b is entry 8 b + i of the mask.

    Args:
        mask: (out, atoms) bool; for 2:4 with two True in each group of four columns.

    Raises:
        ValueError: the pattern is 2:4 and a group has not exactly two.
    """
    bits = mask.flatten()
    if pattern == "2:4":
        groups = mask.reshape(-1, 4)
        if mask.shape[1] % 4 or not (groups.sum(1) == 2).all():
            raise ValueError("the 2:4 pattern needs exactly two codes in each group of four atoms")
        positions = groups.nonzero()[:, 1]
        bits = torch.stack([positions & 1, positions >> 1], dim=1).flatten().bool()
    padded = bits.new_zeros(support_nbytes(*mask.shape) * 8, dtype=torch.uint8)
    padded[: len(bits)] = bits.to(torch.uint8)
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack(support: Tensor, out_features: int, atoms: int, pattern: Pattern) -> Tensor:
    """The mask (out, atoms) bool, the inverse of `pack`."""
    places = _places(pattern, support.device)[support.int()]
    return places.flatten()[: out_features * atoms].view(out_features, atoms)


@functools.cache
def _places(pattern: Pattern, device: torch.device) -> Tensor:
    """(256, 8) bool: for every value of a byte of the support, the eight entries of the mask that it encodes."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    if pattern == "free":
        return bits.bool().to(device)
    positions = (bits[:, 0::2] + 2 * bits[:, 1::2]).view(256, 2, 2)  # two groups of four, two positions in each
    return torch.zeros(256, 2, 4, dtype=torch.bool).scatter_(2, positions, True).view(256, 8).to(device)


@dataclass(frozen=True)
class Dictionary(Form):
    """`weight ≈ codes @ atoms`.

    Args:
        atoms: (k, in).
        values: (nonzeros,) the nonzero codes, row by row.
        support: (bytes,) uint8, where they are, as `pack` writes it.
        out_features: rows of the codes.
        pattern: how `support` is encoded.
        bias: (out,) or None.
    """

    kind: ClassVar[str] = "dictionary"
    atoms: Tensor
    values: Tensor
    support: Tensor
    out_features: int
    pattern: Pattern = "free"
    bias: Tensor | None = None

    @staticmethod
    def of(codes: Tensor, mask: Tensor, atoms: Tensor, pattern: Pattern = "free") -> Dictionary:
        """From (out, k) codes, of which those under the mask are stored, and (k, in) atoms."""
        return Dictionary(atoms, codes[mask], pack(mask, pattern), len(codes), pattern)

    def tensors(self) -> dict[str, Tensor]:
        named = {"weight": self.atoms.contiguous(), "values": self.values.contiguous(), "support": self.support.contiguous()}
        return named if self.bias is None else named | {"bias": self.bias.contiguous()}

    def codes(self) -> Tensor:
        """(out, k) with the zeros."""
        return expand(self.values, unpack(self.support, self.out_features, len(self.atoms), self.pattern))

    def dense(self) -> Tensor:
        return self.codes() @ self.atoms

    def spec(self) -> Spec:
        sizes = {"atoms": len(self.atoms), "nonzeros": len(self.values)}
        return {"kind": self.kind, **sizes, "pattern": self.pattern, "bias": self.bias is not None}

    def with_bias(self, bias: Tensor | None) -> Dictionary:
        if bias is None:
            return self
        total = bias.to(self.atoms) if self.bias is None else self.bias + bias.to(self.bias)
        return Dictionary(self.atoms, self.values, self.support, self.out_features, self.pattern, total)

    def stored(self, dtype: torch.dtype) -> Dictionary:
        atoms, values = self.atoms.to("cpu", dtype).contiguous(), self.values.to("cpu", dtype).contiguous()
        bias = None if self.bias is None else self.bias.to("cpu", dtype)
        return Dictionary(atoms, values, self.support.to("cpu"), self.out_features, self.pattern, bias)


def expand(values: Tensor, mask: Tensor) -> Tensor:
    """(out, k) codes from their nonzero values and their mask; differentiable in the values."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


class DictionaryLinear(nn.Module):
    """`y = codes (weight x) + bias`, where `weight` holds the form's atoms, (k, in).

    Inputs of up to `GATHER_UP_TO` tokens are multiplied by gathering: each output sums its few coefficients of `weight x`. For
    longer inputs the codes are expanded with their zeros for one dense multiplication. From the first short input on, gathering
    keeps an index of 4 bytes per value in memory; it is not stored in the file.
    """

    def __init__(self, spec: Spec, in_features: int, out_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.atoms = in_features, out_features, int(spec["atoms"])
        self.pattern: Pattern = spec["pattern"]
        self.weight = nn.Parameter(torch.empty(self.atoms, in_features, dtype=dtype))
        self.values = nn.Parameter(torch.empty(spec["nonzeros"], dtype=dtype))
        support = torch.empty(support_nbytes(out_features, self.atoms), dtype=torch.uint8)
        self.support = nn.Parameter(support, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if spec["bias"] else None
        self._starts: Tensor | None = None  # first value of each row (out,), int32
        self._index: tuple[Tensor, Tensor] | None = None  # columns (nonzeros,) and first value of each row (out,), int32

    def mask(self) -> Tensor:
        """(out, k) bool: where the codes are not zero."""
        return unpack(self.support, self.out_features, self.atoms, self.pattern)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_coefficients(nn.functional.linear(x, self.weight))

    def of_coefficients(self, z: Tensor) -> Tensor:
        """codes z + bias for (..., k) coefficients, in the fastest way."""
        if (y := sparse(self, z)) is not None:
            return y
        # a compiler cannot trace how the index is found, whose size depends on the codes
        known = self._index is not None or not torch.compiler.is_compiling()
        return self.gather(z) if known and z.numel() <= GATHER_UP_TO * self.atoms else self.multiply(z)

    def multiply(self, z: Tensor) -> Tensor:
        """codes z + bias for (..., k) coefficients, by a dense multiplication."""
        return nn.functional.linear(z, expand(self.values, self.mask()), self.bias)

    def gather(self, z: Tensor) -> Tensor:
        """The same, by a weighted sum over each row's few coefficients."""
        columns, starts = self._indices()
        flat = z.reshape(-1, self.atoms)
        # torch's kernel takes three times as long for one column as for two
        table = (flat.expand(2, -1) if len(flat) == 1 else flat).T.contiguous()
        y = nn.functional.embedding_bag(columns, table, starts, mode="sum", per_sample_weights=self.values).T[: len(flat)]
        y = y.reshape(*z.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _indices(self) -> tuple[Tensor, Tensor]:
        if self._index is None or self._index[0].device != self.values.device:
            mask = self.mask()
            counts = mask.sum(1)
            self._index = mask.nonzero()[:, 1].int(), (counts.cumsum(0) - counts).int()
        return self._index

    def starts(self) -> Tensor | None:
        """(out,) int32: the number of values before each row; None while code is compiled that has not been run before."""
        if self._starts is None or self._starts.device != self.support.device:
            if torch.compiler.is_compiling():  # a tensor made there must not outlive the call
                return None
            counts = self.mask().sum(1)
            self._starts = (counts.cumsum(0) - counts).int()
        return self._starts

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._starts = self._index = None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) matrix that this module multiplies by, in `dtype`."""
        return expand(self.values.to(dtype), self.mask()) @ self.weight.to(dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, atoms={self.atoms}, "
            f"nonzeros={len(self.values)}, pattern={self.pattern}, bias={self.bias is not None}"
        )


class DictionarySpec(FormSpec):
    """Spec of atoms and codes."""

    atoms: Count
    nonzeros: int = Field(ge=0)
    pattern: Pattern
    bias: bool

    def require_fit(self, in_features: int, out_features: int) -> None:
        most = out_features * self.atoms
        if self.nonzeros > most or (self.pattern == "2:4" and (2 * self.nonzeros != most or self.atoms % 4)):
            raise ValueError(
                f"{self.nonzeros} codes of {self.atoms} atoms in the pattern '{self.pattern}' do not fit {out_features} rows"
            )


SPECS[Dictionary.kind] = DictionarySpec
MODULES[Dictionary.kind] = DictionaryLinear
