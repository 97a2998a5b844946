"""Pruned feed-forwards: their options, and the solutions of their matrices.

All matrices of a feed-forward lose the same inner channels: the gate and up projections lose rows and biases, the down
projection loses columns.
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
from .feed_forward import DOWN


def channel_options(shapes: Sequence[Shape], slots: Sequence[str], multiple: int) -> list[JointOption]:
    """One option for every smaller number of inner channels, in steps of `multiple`; the down projection is the last shape."""
    inner = shapes[-1].in_features
    found = []
    for channels in range(multiple, inner, multiple):
        left = [pruned_shape(shape, slot, inner, channels) for shape, slot in zip(shapes, slots, strict=True)]
        sizes = [small.nbytes - gone_biases(shape, small) for shape, small in zip(shapes, left, strict=True)]
        members = tuple(Option(Choice(channels=channels), size) for size in sizes)
        found.append(JointOption(Choice(channels=channels), sum(sizes), members))
    return found


def pruned_shape(shape: Shape, slot: str, inner: int, channels: int) -> Shape:
    """The shape of a feed-forward's matrix with `channels` of its `inner` channels.

    The down projection loses columns, the others lose rows; of a fused gate and up, each half does.
    """
    if slot == DOWN:
        return replace(shape, in_features=channels)
    return replace(shape, out_features=shape.out_features // inner * channels)


def gone_biases(shape: Shape, left: Shape) -> int:
    """Bytes of the biases of pruned rows, which an option counts as saved."""
    return (shape.out_features - left.out_features) * shape.element if shape.bias else 0


class ChannelSolution(Solution):
    """One matrix of a feed-forward, for every number of kept channels."""

    weight: Tensor  # (out, in)
    reads: bool  # whether it is the down projection: the channels are its columns

    @property
    @abstractmethod
    def inner(self) -> int:
        """The number of channels before pruning."""

    @abstractmethod
    def kept(self, channels: int) -> Tensor:
        """(channels,) the channels that are kept where so many are, ascending; a subset of those kept at any larger number."""

    def form(self, choice: Choice) -> Pruned:
        rows, columns = self.left(choice)
        return Pruned(Dense(self.at(rows, columns)), rows, columns, (len(self.weight), self.weight.shape[1]))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(rows, columns) float64, the values to store at these rows and columns."""
        return self.weight[rows[:, None], columns].double()

    def left(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """The rows and the columns that are kept, both ascending.

        Raises:
            ValueError: the choice is dense.
        """
        if choice.channels is None:
            raise ValueError("a dense target is not solved")
        kept = self.kept(choice.channels)
        rows, columns = (torch.arange(n, device=self.weight.device) for n in self.weight.shape)
        if self.reads:
            return rows, kept
        return torch.cat([kept + half * self.inner for half in range(len(self.weight) // self.inner)]), columns


@dataclass(frozen=True)
class Channels(ChannelSolution):
    """One matrix of a feed-forward whose channels are ranked once, each by its own importance.

    Args:
        weight: (out, in).
        energy: (inner,) float64, the loss of this matrix for each pruned channel: Σ E[x²] W² over the channel's row or column.
        ranking: (inner,) channels in the order in which they are kept; the last one is pruned first.
        reads: whether it is the down projection: the channels are its columns.
    """

    weight: Tensor
    energy: Tensor
    ranking: Tensor
    reads: bool

    @property
    def inner(self) -> int:
        return len(self.ranking)

    def kept(self, channels: int) -> Tensor:
        return self.ranking[:channels].sort().values

    def loss(self, choice: Choice) -> float:
        return float(self.energy[self.ranking[choice.channels :]].sum())

    @property
    def total(self) -> float:
        return float(self.energy.sum())
