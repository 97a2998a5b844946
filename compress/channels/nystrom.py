"""Nyström: prunes feed-forward channels and refits the down projection; every other matrix by `svd-llm`.

Attention matrices are close to low rank, feed-forward matrices are not (LoRAP). Whole inner channels of the feed-forward are
therefore pruned, which takes no second factor, and the down projection is refitted to the kept channels:
`W_S + W_R C_RS (C_SS + λ)⁻¹` is the least-squares map for the calibration inputs, S the kept channels, R the pruned ones. At
each step the method prunes the few channels whose removal, after refitting the rest, changes the output least
(‖w‖² / [C⁻¹]_ii, Optimal Brain Surgeon); then it updates the costs of the others. The result is an ordinary, smaller
feed-forward.

When to use: with `allocation: kl` it is the best of the one-shot methods here (docs/allocation.md) and depends least on the
calibration text. The result needs no special kernel. With a uniform budget it shows what pruning channels alone gains.

Cost: one Cholesky inverse of the inner width and its elimination, 2/3 n³ in float64 per feed-forward; attention as `svd-llm`.
Statistics: a gram (inner, inner) per feed-forward; for the other targets as `svd-llm`.

Source: Lin et al., MoDeGPT, arXiv 2408.09632, §3.2, type I (the Nyström form of the down projection, its ridge); the pruning
order by Optimal Brain Surgeon, Hassibi and Stork, NeurIPS 1992, applied to groups as in ZipLM, arXiv 2302.04089. Differences
from MoDeGPT: channels are pruned one after the other, not all at once by ridge leverage scores; the ridge is relative to each
channel's own energy, so that rescaling a channel changes nothing; attention is factored, its heads are not made narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from ...errors import LrcError
from ..base import Joinable, Joint, JointUnit, Settings, Solution, TargetStats, method
from ..low_rank import svd_llm
from ..options import Choice, JointOption, Shape
from .base import ChannelSolution, channel_options
from .feed_forward import DOWN, GATE_UP, UP, by_layer, feed_forwards

_BLOCKS = 16  # 1/16 of the channels that are left is pruned between two updates of the whole inverse (docs/LOG.md)
_READ = {GATE_UP: frozenset[str](), UP: frozenset[str](), DOWN: frozenset({"gram"})}  # only the down projection needs a gram
_SEEN = 1e-6  # of the largest root mean square; channels with a smaller one are treated as if they had this one


class NystromSettings(Settings):
    """Settings of `nystrom`."""

    ridge: float = Field(0.1, ge=1e-8, le=1e3, description="ridge on each channel's energy, relative to that energy")


def units(targets: Sequence[Joinable], settings: NystromSettings) -> list[JointUnit]:
    """The feed-forwards that are recognised; each expert is one."""
    return [each.as_unit() for layer in by_layer(targets) for each in feed_forwards(layer)]


def options(shapes: Sequence[Shape], slots: Sequence[str], settings: NystromSettings, multiple: int = 1) -> list[JointOption]:
    """Every smaller number of channels."""
    return channel_options(shapes, slots, multiple)


@dataclass(frozen=True)
class Reading:
    """A down projection and the channels that it reads, scaled to equal energy.

    Args:
        weight: (out, inner) float64, its columns times `scale`.
        gram: (inner, inner) float64 with ones on the diagonal, the ridge added.
        scale: (inner,) float64, each channel's root mean square.
        ridge: what was added to the diagonal.
    """

    weight: Tensor
    gram: Tensor
    scale: Tensor
    ridge: float

    @staticmethod
    def of(weight: Tensor, gram: Tensor, ridge: float) -> Reading:
        """From a weight (out, inner) and its inputs' gram."""
        scale = gram.diagonal().double().clamp_min(0).sqrt()
        largest = float(scale.max())
        scale = scale.clamp_min(_SEEN * largest) if largest > 0 else torch.ones_like(scale)  # an expert that saw no token
        equal = gram.to(torch.float64, copy=True).div_(scale).div_(scale[:, None])
        equal.diagonal().add_(ridge)
        return Reading(weight.double() * scale, equal, scale, ridge)

    def inverse(self) -> Tensor:
        """(inner, inner) float64, of the gram."""
        return torch.cholesky_inverse(self._factor(self.gram))

    def fitted(self, kept: Tensor) -> Tensor:
        """The weight (out, kept) refitted to the kept channels, in the original scale of the channels."""
        gone = _others(len(self.scale), kept)
        factor = self._factor(self.gram[kept[:, None], kept])
        more = torch.cholesky_solve(self.gram[kept[:, None], gone] @ self.weight[:, gone].T, factor).T
        return (self.weight[:, kept] + more) / self.scale[kept]

    def _factor(self, gram: Tensor) -> Tensor:
        """The Cholesky factor of a principal submatrix of the gram.

        Raises:
            LrcError: there is none, because rounding errors of the float32 statistics exceed the ridge.
        """
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise LrcError(
                f"The gram of {len(gram)} channels has no Cholesky factor with a ridge of {self.ridge:g}.",
                "Raise settings.ridge; 0.1 is the default.",
            )
        return factor


def _others(count: int, some: Tensor) -> Tensor:
    """Indices below `count` that are not in `some`, ascending."""
    others = torch.ones(count, dtype=torch.bool, device=some.device)
    others[some] = False
    return others.nonzero()[:, 0]


class Elimination:
    """Prunes the channels one after the other, lazily: only as far as a caller has asked.

    A block of the cheapest channels is pruned together, the cheapest first. Then the inverse and the weight are updated in
    place, as in Gaussian elimination; the entries of the channels that are left are the leading part of both. The reported
    losses are exact for the order in which channels were pruned.

    Args:
        reading: the down projection and its channels.
        outputs: (out, out) float64, multiplies an error of the outputs before it is squared; None: the plain squared error.
            The refitted down projection does not depend on it.
    """

    def __init__(self, reading: Reading, outputs: Tensor | None = None) -> None:
        self.reading, self._outputs = reading, outputs
        count = len(reading.scale)
        self._left = count
        self._inverse, self._weight = reading.inverse(), self._weighed()
        # first the channels that are left, then the pruned ones, the first of them last; and what each added to the loss
        self._order, self._lost = torch.arange(count, device=reading.scale.device), torch.zeros_like(reading.scale)

    def _weighed(self) -> Tensor:
        return self.reading.weight.clone() if self._outputs is None else self._outputs @ self.reading.weight

    @cached_property
    def total(self) -> float:
        """The loss where no channel is kept: tr(W C Wᵀ) of the weight in the outputs' metric."""
        weight = self._weighed()
        return float((weight @ self.reading.gram).mul_(weight).sum())

    def kept(self, channels: int) -> Tensor:
        """(channels,) the channels that are kept where so many are, ascending."""
        self._prune_until(channels)
        return self._order[:channels].sort().values

    def loss(self, channels: int) -> float:
        """The loss where this many channels are kept."""
        self._prune_until(channels)
        return float(self._lost[channels:].sum())

    def _prune_until(self, channels: int) -> None:
        while self._left > channels:
            self._prune_block()

    def _prune_block(self) -> None:
        """Prune the cheapest channels together."""
        left = self._left
        scores = self._weight[:, :left].square().sum(0) / self._inverse.diagonal()[:left]
        cheapest = scores.sort(stable=True).indices[: -(-left // _BLOCKS)]
        stay = left - len(cheapest)
        self._move_to_end(cheapest.flip(0))
        # L Lᵀ: their block of the inverse in pruning order; a channel adds the squared norm of its row of L⁻¹ Wᵀ to the loss
        factor = torch.linalg.cholesky(self._inverse[stay:left, stay:left].flip(0, 1))
        both = torch.cat([self._weight[:, stay:left].T, self._inverse[stay:left, :stay]], dim=1).flip(0)
        weight, across = torch.linalg.solve_triangular(factor, both, upper=False).split([len(self._weight), stay], dim=1)
        self._lost[stay:left] = weight.square().sum(1).flip(0)
        self._weight[:, :stay].addmm_(weight.T, across, alpha=-1)
        self._inverse[:stay, :stay].addmm_(across.T, across, alpha=-1)
        self._left = stay

    def _move_to_end(self, some: Tensor) -> None:
        """Swap channels in the order, the weight and the inverse so that `some` are the last of those that are left."""
        left, stay = self._left, self._left - len(some)
        among = torch.zeros(left, dtype=torch.bool, device=some.device)
        among[some] = True
        holes, fill = among[:stay].nonzero()[:, 0], (~among[stay:]).nonzero()[:, 0] + stay
        into = torch.cat([holes, torch.arange(stay, left, device=some.device)])
        out_of = torch.cat([fill, some])
        self._order[into] = self._order[out_of]
        self._weight[:, into] = self._weight[:, out_of]
        self._inverse[into, :left] = self._inverse[out_of, :left]
        self._inverse[:left, into] = self._inverse[:left, out_of]


@dataclass(frozen=True)
class Member(ChannelSolution):
    """A gate or up projection. It has no loss of its own: the loss of pruned channels is counted at the down projection.

    Args:
        weight: (out, in).
        elimination: prunes the channels of the feed-forward.
    """

    weight: Tensor
    elimination: Elimination
    reads: bool = False

    @property
    def inner(self) -> int:
        return len(self.elimination.reading.scale)

    def kept(self, channels: int) -> Tensor:
        return self.elimination.kept(channels)

    def loss(self, choice: Choice) -> float:
        return 0.0

    @property
    def total(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Fitted(Member):
    """The down projection, refitted to the kept channels."""

    reads: bool = True

    def loss(self, choice: Choice) -> float:
        return self.elimination.loss(choice.channels or 0)

    @property
    def total(self) -> float:
        return self.elimination.total

    @property
    def damping(self) -> float:
        return self.elimination.reading.ridge

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.elimination.reading.fitted(columns)


def solve_together(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], slots: Sequence[str], settings: NystromSettings
) -> Sequence[Solution]:
    """A feed-forward's weights (out, in), the down projection last; losses are squared errors of its output."""
    return solved_feed_forward(weights, statistics[-1], settings.ridge)


def solved_feed_forward(
    weights: Sequence[Tensor], reads: TargetStats, ridge: float, outputs: Tensor | None = None
) -> Sequence[Solution]:
    """One solution for each weight (out, in) of a feed-forward, the down projection last.

    Args:
        reads: statistics of the down projection.
        ridge: as in the settings.
        outputs: as in `Elimination`.
    """
    assert reads.group.gram is not None
    elimination = Elimination(Reading.of(weights[-1], reads.group.gram, ridge), outputs)
    return [*(Member(weight, elimination) for weight in weights[:-1]), Fitted(weights[-1], elimination)]


@method(
    "nystrom",
    source="arXiv 2408.09632",
    needs=["output_gram"],
    settings=NystromSettings,
    joint=Joint(units, options, solve_together, shares=False, needs=_READ),
)
def solve(weight: Tensor, stats: TargetStats, settings: NystromSettings) -> Solution:
    """A target (out, in) outside the feed-forwards: as `svd-llm`."""
    return svd_llm.solve(weight, stats, settings)
