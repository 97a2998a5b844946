"""Nyström: feed-forwards lose channels, and the matrix that reads them makes up for it; everything else by `svd-llm`.

Attention's matrices are of low rank and feed-forwards are not (LoRAP). A feed-forward therefore loses whole inner channels,
which costs no second factor, and its down projection is fitted anew to the channels that stay: `W_S + W_R C_RS (C_SS + λ)⁻¹` is
the least-squares map for the inputs that calibration saw, S the channels that stay, R those that leave. Which ones leave is
decided one by one: always the channel whose absence, made up for by all that are still there, moves the output least
(‖w‖² / [C⁻¹]_ii, Optimal Brain Surgeon). What is left is an ordinary, smaller feed-forward.

When to use: with `allocation: kl` the best of the one-shot methods here (docs/allocation.md), and the least bound to its
calibration text; the result needs no kernel of its own. Alone in a uniform budget it shows what channels are worth.

Cost: one Cholesky inverse of the inner width and its elimination, 2/3 n³ in float64 per feed-forward; attention as `svd-llm`.
Statistics: a gram (inner, inner) per feed-forward; of the others as `svd-llm`.

Source: Lin et al., MoDeGPT, arXiv 2408.09632, §3.2, type I (the Nyström form of the down projection, its ridge); the order by
Optimal Brain Surgeon, Hassibi and Stork, NeurIPS 1992, applied to groups as ZipLM, arXiv 2302.04089. Differences from MoDeGPT:
channels leave one by one, not by their ridge leverage scores at once; the ridge is relative to each channel's own energy, so
that rescaling a channel changes nothing; attention is factored and not cut into narrower heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..errors import LrcError
from . import svd_llm
from .base import Choice, Joinable, Joint, JointOffer, Settings, Shape, Solution, TargetSet, TargetStats, method
from .channels import Channels, Pruned, channel_offers
from .feed_forward import by_layer, feed_forwards

_BLOCKS = 16  # a block of at most this part of the channels leaves between two updates of the whole inverse (docs/LOG.md)
_SEEN = 1e-6  # of the largest root mean square: channels below it count as if they had this


class NystromSettings(Settings):
    """Settings of `nystrom`."""

    ridge: float = Field(0.1, ge=1e-8, le=1e3, description="added to each channel's energy, relative to it")


def sets(targets: Sequence[Joinable], settings: NystromSettings) -> list[TargetSet]:
    """The feed-forwards that are recognised, each expert one."""
    return [each.as_set() for layer in by_layer(targets) for each in feed_forwards(layer)]


def offers(shapes: Sequence[Shape], parts: Sequence[str], settings: NystromSettings, multiple: int = 1) -> list[JointOffer]:
    """Every number of channels."""
    return channel_offers(shapes, parts, multiple)


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
        wide = gram.double()
        scale = wide.diagonal().clamp_min(0).sqrt()
        largest = float(scale.max())
        scale = scale.clamp_min(_SEEN * largest) if largest > 0 else torch.ones_like(scale)  # an expert that saw no token
        equal = wide / scale / scale[:, None]
        equal.diagonal().add_(ridge)
        return Reading(weight.double() * scale, equal, scale, ridge)

    def eliminated(self) -> tuple[Tensor, Tensor]:
        """(channels in the order in which they leave, what each adds to the loss), both (inner,).

        A block of the cheapest leaves at a time, in it one after the other; then the inverse and the weight are brought up to
        date, as by Gaussian elimination. The losses are exact for the order.
        """
        inverse = torch.cholesky_inverse(self._factor(self.gram))
        weight, left = self.weight, torch.arange(len(self.scale), device=self.scale.device)
        order, lost = [], []
        while len(left):
            scores = weight.square().sum(0) / inverse.diagonal()
            block = scores.sort(stable=True).indices[: -(-len(left) // _BLOCKS)]
            inside, losses = _one_by_one(weight[:, block], inverse[block[:, None], block])
            order.append(left[block[inside]])
            lost.append(losses)
            stays = _others(len(left), block)
            across = inverse[block[:, None], stays]
            solved = torch.cholesky_solve(across, torch.linalg.cholesky(inverse[block[:, None], block]))
            weight = weight[:, stays] - weight[:, block] @ solved
            inverse = inverse[stays[:, None], stays].addmm_(across.T, solved, alpha=-1)
            left = left[stays]
        return torch.cat(order), torch.cat(lost)

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


def _one_by_one(weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which the channels of a block leave, and what each adds to the loss.

    Args:
        weight: (out, block).
        inverse: (block, block), their part of the inverse.
    """
    weight, inverse = weight.clone(), inverse.clone()
    order, lost = [], []
    gone = torch.zeros(len(inverse), dtype=torch.bool, device=weight.device)
    for _ in range(len(inverse)):
        scores = weight.square().sum(0) / inverse.diagonal()
        first = int(scores.masked_fill(gone, torch.inf).argmin())
        order.append(first)
        lost.append(float(scores[first]))
        gone[first] = True
        row = inverse[first] / inverse[first, first]
        weight -= weight[:, first, None] * row
        inverse = inverse - inverse[:, first, None] * row
        inverse.diagonal()[gone] = 1.0  # never looked at again; keeps the division finite
    return torch.tensor(order, device=weight.device), torch.tensor(lost, dtype=weight.dtype, device=weight.device)


@dataclass(frozen=True)
class Fitted(Channels):
    """The matrix that reads the channels, fitted to those that stay.

    Args:
        reading: its weight and gram.
    """

    reading: Reading

    @property
    def damping(self) -> float:
        return self.reading.ridge

    def form(self, choice: Choice) -> Pruned:
        rows, columns = self.left(choice)
        return Pruned(self.reading.fitted(columns), rows, columns, (len(self.weight), self.weight.shape[1]))


def solve_set(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], parts: Sequence[str], settings: NystromSettings
) -> Sequence[Solution]:
    """A feed-forward's weights (out, in), the one that reads the channels last; what is lost is lost at its output."""
    gram = statistics[-1].group.gram
    assert gram is not None
    reading = Reading.of(weights[-1], gram, settings.ridge)
    order, lost = reading.eliminated()
    stays, energy = order.flip(0), torch.zeros_like(lost).index_copy_(0, order, lost)
    makers = [Channels(weight, torch.zeros_like(energy), stays, reads=False) for weight in weights[:-1]]
    return [*makers, Fitted(weights[-1], energy, stays, True, reading)]


@method(
    "nystrom",
    source="arXiv 2408.09632",
    needs=["output_gram"],
    settings=NystromSettings,
    joint=Joint(sets, offers, solve_set, shares=False, needs=frozenset({"gram"})),
)
def solve(weight: Tensor, stats: TargetStats, settings: NystromSettings) -> Solution:
    """A target (out, in) by itself: as `svd-llm`."""
    return svd_llm.solve(weight, stats, settings)
