"""Pruned feed-forwards: the form, the same matrix with fewer rows or columns; its sizes; its solution.

The targets of one feed-forward lose the same inner channels: those that make them (gate, up) lose rows and biases, the one that
reads them (down) loses columns. Which channels stay need not be stored: nobody else sees them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .base import Solution
from .feed_forward import READER
from .forms import MODULES, Dense, Form, Spec, build_module
from .offers import Choice, JointOffer, Offer, Shape


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


def channel_offers(shapes: Sequence[Shape], parts: Sequence[str], multiple: int) -> list[JointOffer]:
    """Every number of inner channels (in steps of `multiple`) of a feed-forward, but all of them; the reader last."""
    inner = shapes[-1].in_features
    found = []
    for channels in range(multiple, inner, multiple):
        left = [pruned_shape(shape, part, inner, channels) for shape, part in zip(shapes, parts, strict=True)]
        sizes = [small.nbytes - gone_biases(shape, small) for shape, small in zip(shapes, left, strict=True)]
        members = tuple(Offer(Choice(channels=channels), size) for size in sizes)
        found.append(JointOffer(Choice(channels=channels), sum(sizes), members))
    return found


def pruned_shape(shape: Shape, part: str, inner: int, channels: int) -> Shape:
    """What is left of a feed-forward's matrix: columns of the reader, rows of the others (of each half, if there are two)."""
    if part == READER:
        return replace(shape, in_features=channels)
    return replace(shape, out_features=shape.out_features // inner * channels)


def gone_biases(shape: Shape, left: Shape) -> int:
    """Bytes of the biases that leave with their rows, which an offer counts as saved."""
    return (shape.out_features - left.out_features) * shape.element if shape.bias else 0


class ChannelSolution(Solution):
    """One target of a feed-forward, of which any number of channels may stay."""

    weight: Tensor  # (out, in)
    reads: bool  # whether the channels are the target's columns

    @property
    @abstractmethod
    def inner(self) -> int:
        """How many channels there are."""

    @abstractmethod
    def kept(self, channels: int) -> Tensor:
        """(channels,) which ones stay where this many do, ascending; they are among those of any larger number."""

    def form(self, choice: Choice) -> Pruned:
        rows, columns = self.left(choice)
        return Pruned(Dense(self.at(rows, columns)), rows, columns, (len(self.weight), self.weight.shape[1]))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(rows, columns) float64, what stands at these."""
        return self.weight[rows[:, None], columns].double()

    def left(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """Which rows and which columns stay, both ascending."""
        if choice.channels is None:
            raise ValueError("a dense target is not solved")
        kept = self.kept(choice.channels)
        rows, columns = (torch.arange(n, device=self.weight.device) for n in self.weight.shape)
        if self.reads:
            return rows, kept
        return torch.cat([kept + half * self.inner for half in range(len(self.weight) // self.inner)]), columns


@dataclass(frozen=True)
class Channels(ChannelSolution):
    """One target of a pruned feed-forward whose channels are ordered beforehand, what each is worth known by itself.

    Args:
        weight: (out, in).
        energy: (inner,) float64, what this target loses with each channel: Σ E[x²] W² over what leaves with it.
        stays: (inner,) channels in the order in which they are kept, the last one leaves first.
        reads: whether the channels are the target's columns.
    """

    weight: Tensor
    energy: Tensor
    stays: Tensor
    reads: bool

    @property
    def inner(self) -> int:
        return len(self.stays)

    def kept(self, channels: int) -> Tensor:
        return self.stays[:channels].sort().values

    def loss(self, choice: Choice) -> float:
        return float(self.energy[self.stays[choice.channels :]].sum())

    @property
    def total(self) -> float:
        return float(self.energy.sum())
