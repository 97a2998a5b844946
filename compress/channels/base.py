"""Pruned feed-forwards: the sizes at which they can be stored, and their solutions.

The targets of one feed-forward lose the same inner channels: those that make them (gate, up) lose rows and biases, the one that
reads them (down) loses columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..base import Solution
from ..forms.base import Dense
from ..forms.pruned import Pruned
from ..options import Choice, JointOption, Option, Shape
from .feed_forward import READER


def channel_options(shapes: Sequence[Shape], parts: Sequence[str], multiple: int) -> list[JointOption]:
    """Every number of inner channels (in steps of `multiple`) of a feed-forward, but all of them; the reader last."""
    inner = shapes[-1].in_features
    found = []
    for channels in range(multiple, inner, multiple):
        left = [pruned_shape(shape, part, inner, channels) for shape, part in zip(shapes, parts, strict=True)]
        sizes = [small.nbytes - gone_biases(shape, small) for shape, small in zip(shapes, left, strict=True)]
        members = tuple(Option(Choice(channels=channels), size) for size in sizes)
        found.append(JointOption(Choice(channels=channels), sum(sizes), members))
    return found


def pruned_shape(shape: Shape, part: str, inner: int, channels: int) -> Shape:
    """What is left of a feed-forward's matrix: columns of the reader, rows of the others (of each half, if there are two)."""
    if part == READER:
        return replace(shape, in_features=channels)
    return replace(shape, out_features=shape.out_features // inner * channels)


def gone_biases(shape: Shape, left: Shape) -> int:
    """Bytes of the biases that leave with their rows, which an option counts as saved."""
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
