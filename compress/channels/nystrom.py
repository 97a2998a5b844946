"""Nyström: feed-forwards lose channels, and the matrix that reads them makes up for it; everything else by `svd-llm`.

Attention's matrices are of low rank and feed-forwards are not (LoRAP). A feed-forward therefore loses whole inner channels,
which costs no second factor, and its down projection is fitted anew to the channels that stay: `W_S + W_R C_RS (C_SS + λ)⁻¹` is
the least-squares map for the inputs that calibration saw, S the channels that stay, R those that leave. Always those leave
whose absence, made up for by all that are still there, moves the output least (‖w‖² / [C⁻¹]_ii, Optimal Brain Surgeon): a few
at a time, then what the others would cost is found anew. What is left is an ordinary, smaller feed-forward.

When to use: with `allocation: kl` the best of the one-shot methods here (docs/allocation.md), and the least bound to its
calibration text; the result needs no kernel of its own. Alone in a uniform budget it shows what channels are worth.

Cost: one Cholesky inverse of the inner width and its elimination, 2/3 n³ in float64 per feed-forward; attention as `svd-llm`.
Statistics: a gram (inner, inner) per feed-forward; of the others as `svd-llm`.

Source: Lin et al., MoDeGPT, arXiv 2408.09632, §3.2, type I (the Nyström form of the down projection, its ridge); the order by
Optimal Brain Surgeon, Hassibi and Stork, NeurIPS 1992, applied to groups as ZipLM, arXiv 2302.04089. Differences from MoDeGPT:
channels leave in turn, not by their ridge leverage scores at once; the ridge is relative to each channel's own energy, so
that rescaling a channel changes nothing; attention is factored and not cut into narrower heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor

from ...errors import LrcError
from ..base import Joinable, Joint, Settings, Solution, TargetSet, TargetStats, method
from ..low_rank import svd_llm
from ..options import Choice, JointOption, Shape
from .base import ChannelSolution, channel_options
from .feed_forward import GATE_UP, MAKER, READER, by_layer, feed_forwards

_BLOCKS = 16  # a block of at most this part of the channels leaves between two updates of the whole inverse (docs/LOG.md)
_READ = {GATE_UP: frozenset[str](), MAKER: frozenset[str](), READER: frozenset({"gram"})}  # of a feed-forward, the one gram
_SEEN = 1e-6  # of the largest root mean square: channels below it count as if they had this


class NystromSettings(Settings):
    """Settings of `nystrom`."""

    ridge: float = Field(0.1, ge=1e-8, le=1e3, description="added to each channel's energy, relative to it")


def sets(targets: Sequence[Joinable], settings: NystromSettings) -> list[TargetSet]:
    """The feed-forwards that are recognised, each expert one."""
    return [each.as_set() for layer in by_layer(targets) for each in feed_forwards(layer)]


def options(shapes: Sequence[Shape], parts: Sequence[str], settings: NystromSettings, multiple: int = 1) -> list[JointOption]:
    """Every number of channels."""
    return channel_options(shapes, parts, multiple)


@dataclass(frozen=True)
class Reading:
    """What a down projection reads, its channels scaled to the same energy.

    Args:
        weight: (out, inner) float64, its columns times `scale`.
        gram: (inner, inner) float64 with ones on the diagonal, the ridge added.
        scale: (inner,) float64, each channel's root mean square.
        ridge: what was added.
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
        """The weight (out, kept) in the channels' own units, made up for those that are gone."""
        gone = _others(len(self.scale), kept)
        factor = self._factor(self.gram[kept[:, None], kept])
        more = torch.cholesky_solve(self.gram[kept[:, None], gone] @ self.weight[:, gone].T, factor).T
        return (self.weight[:, kept] + more) / self.scale[kept]

    def _factor(self, gram: Tensor) -> Tensor:
        """The Cholesky factor of a part of the gram.

        Raises:
            LrcError: rounding in the statistics (float32) is larger than the ridge.
        """
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            raise LrcError(
                f"The gram of {len(gram)} channels has no Cholesky factor with a ridge of {self.ridge:g}.",
                "Raise settings.ridge; 0.1 is the default.",
            )
        return factor


def _others(count: int, some: Tensor) -> Tensor:
    """Indices below `count` that are not among some, ascending."""
    others = torch.ones(count, dtype=torch.bool, device=some.device)
    others[some] = False
    return others.nonzero()[:, 0]


class Elimination:
    """Channels leave a reading one after the other; only as many have left as somebody asked about.

    Some of the cheapest leave together, the cheapest first; then the inverse and the weight are brought up to date in place, as
    by Gaussian elimination: what stays lies in their leading part. Losses are exact for the order.

    Args:
        reading: of the channels.
        outputs: (out, out) float64, by which an error of the outputs is multiplied before it is squared; by default it counts
            as it is. What the reader is fitted to does not change with it.
    """

    def __init__(self, reading: Reading, outputs: Tensor | None = None) -> None:
        self.reading, self._outputs = reading, outputs
        count = len(reading.scale)
        self._left = count
        self._inverse, self._weight = reading.inverse(), self._weighed()
        # those that stay, then the others, the first to leave last; and what each of these added to the loss
        self._order, self._lost = torch.arange(count, device=reading.scale.device), torch.zeros_like(reading.scale)

    def _weighed(self) -> Tensor:
        return self.reading.weight.clone() if self._outputs is None else self._outputs @ self.reading.weight

    @cached_property
    def total(self) -> float:
        """What is lost where no channel stays: tr(W C Wᵀ) of the weight in the outputs' metric."""
        weight = self._weighed()
        return float((weight @ self.reading.gram).mul_(weight).sum())

    def kept(self, channels: int) -> Tensor:
        """(channels,) which ones stay where this many do, ascending."""
        self._leave_until(channels)
        return self._order[:channels].sort().values

    def loss(self, channels: int) -> float:
        """What is lost where this many stay."""
        self._leave_until(channels)
        return float(self._lost[channels:].sum())

    def _leave_until(self, channels: int) -> None:
        while self._left > channels:
            self._block()

    def _block(self) -> None:
        """The cheapest channels leave together."""
        left = self._left
        scores = self._weight[:, :left].square().sum(0) / self._inverse.diagonal()[:left]
        cheapest = scores.sort(stable=True).indices[: -(-left // _BLOCKS)]
        stay = left - len(cheapest)
        self._move_to_end(cheapest.flip(0))
        # L Lᵀ is their part of the inverse in the order in which they leave; what each adds to the loss is a row of L⁻¹ Wᵀ
        factor = torch.linalg.cholesky(self._inverse[stay:left, stay:left].flip(0, 1))
        both = torch.cat([self._weight[:, stay:left].T, self._inverse[stay:left, :stay]], dim=1).flip(0)
        weight, across = torch.linalg.solve_triangular(factor, both, upper=False).split([len(self._weight), stay], dim=1)
        self._lost[stay:left] = weight.square().sum(1).flip(0)
        self._weight[:, :stay].addmm_(weight.T, across, alpha=-1)
        self._inverse[:stay, :stay].addmm_(across.T, across, alpha=-1)
        self._left = stay

    def _move_to_end(self, some: Tensor) -> None:
        """Exchange places in the order, the weight and the inverse so that these are the last that are left."""
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
    """A matrix of a feed-forward. Those that make the channels lose nothing: what is lost is lost at the one that reads them.

    Args:
        weight: (out, in).
        elimination: of the channels.
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
    """The matrix that reads the channels, fitted to those that stay."""

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


def solve_set(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], parts: Sequence[str], settings: NystromSettings
) -> Sequence[Solution]:
    """A feed-forward's weights (out, in), the one that reads the channels last; what is lost is lost at its output."""
    return solved_feed_forward(weights, statistics[-1], settings.ridge)


def solved_feed_forward(
    weights: Sequence[Tensor], reads: TargetStats, ridge: float, outputs: Tensor | None = None
) -> Sequence[Solution]:
    """Weights (out, in) of a feed-forward, the one that reads the channels last.

    Args:
        reads: the reader's statistics.
        ridge: as in the settings.
        outputs: as `Elimination` takes it.
    """
    assert reads.group.gram is not None
    elimination = Elimination(Reading.of(weights[-1], reads.group.gram, ridge), outputs)
    return [*(Member(weight, elimination) for weight in weights[:-1]), Fitted(weights[-1], elimination)]


@method(
    "nystrom",
    source="arXiv 2408.09632",
    needs=["output_gram"],
    settings=NystromSettings,
    joint=Joint(sets, options, solve_set, shares=False, needs=_READ),
)
def solve(weight: Tensor, stats: TargetStats, settings: NystromSettings) -> Solution:
    """A target (out, in) by itself: as `svd-llm`."""
    return svd_llm.solve(weight, stats, settings)
