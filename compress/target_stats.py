"""What calibration tells a method about one target: statistics of its inputs, its outputs and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .linalg import OutputDirections, root

# calibrate/stats.py collects the statistics of the forward pass, calibrate/backward.py those of the gradients
FORWARD_NEEDS = frozenset({"gram", "output_gram", "mean", "abs_mean", "mean_square", "peak_abs_mean"})
BACKWARD_NEEDS = frozenset({"grad_gram", "fisher_in", "weight_grad"})
NEEDS = FORWARD_NEEDS | BACKWARD_NEEDS


class GroupStats:
    """Statistics of the input that a group of targets reads.

    Args:
        tokens: number of tokens in the means.
        gram: (in, in) float32, mean over tokens of x xᵀ.
        mean, abs_mean, mean_square: (in,) float32, means over tokens of x, |x| and x².
        peak_abs_mean: (in,) float32, the largest over calibration samples of the sample's mean |x|.
    """

    def __init__(
        self,
        tokens: int,
        gram: Tensor | None = None,
        mean: Tensor | None = None,
        abs_mean: Tensor | None = None,
        mean_square: Tensor | None = None,
        peak_abs_mean: Tensor | None = None,
    ) -> None:
        self.tokens, self.gram, self.mean, self.abs_mean, self.mean_square = tokens, gram, mean, abs_mean, mean_square
        self.peak_abs_mean = peak_abs_mean
        self._copies: dict[torch.device, GroupStats] = {}

    def to(self, device: torch.device) -> GroupStats:
        """The statistics on `device`; all targets of the group share one copy."""
        own = (self.gram, self.mean, self.abs_mean, self.mean_square, self.peak_abs_mean)
        if all(each is None or each.device == device for each in own):
            return self
        if device not in self._copies:
            moved = [None if each is None else each.to(device) for each in own]
            self._copies[device] = GroupStats(self.tokens, *moved)
        return self._copies[device]

    @cached_property
    def _gram_root(self) -> Tensor:
        assert self.gram is not None
        return root(self.gram)

    def directions(self, weight: Tensor, output_gram: Tensor | None = None) -> OutputDirections:
        """The leading output directions of a weight (out, in). Targets of the group that need the gram's root share it.

        Args:
            output_gram: (out, out) of this weight; takes the place of the group's gram.
        """
        return OutputDirections(weight, self.gram, output_gram, gram_root=lambda: self._gram_root)


@dataclass(frozen=True)
class TargetStats:
    """Statistics of one target: its group's, and its own.

    Args:
        group: shared by all targets that read the same input.
        output_gram: (out, out) float32, mean over tokens of y yᵀ with y = W x (no bias). Collected where it is cheaper
            than the group's gram; None elsewhere, and then `group.gram` is present.
        grad_gram: (out, out) float32, mean over tokens of g gᵀ with g = ∂loss/∂y, the loss summed over a sample's tokens.
        fisher_in: (in,) float32, mean over samples of Σ_out (∂loss/∂W)².
        weight_grad: (out, in) float32, ∂loss/∂W per token: summed over all samples, divided by their number of tokens.
    """

    group: GroupStats
    output_gram: Tensor | None = None
    grad_gram: Tensor | None = None
    fisher_in: Tensor | None = None
    weight_grad: Tensor | None = None

    def to(self, device: torch.device) -> TargetStats:
        """The statistics on `device`."""
        own = (self.output_gram, self.grad_gram, self.fisher_in, self.weight_grad)
        return TargetStats(self.group.to(device), *(None if each is None else each.to(device) for each in own))

    def directions(self, weight: Tensor) -> OutputDirections:
        """The leading output directions of the target's weight (out, in), from whichever second moment was collected."""
        return self.group.directions(weight, self.output_gram)


NOTHING_SEEN = TargetStats(GroupStats(0))  # for methods that need no statistics
