"""LinearPatch: the hidden state after the cut is scaled to its original size, channel by channel in a Hadamard basis.

With x the hidden state before the dropped layers and y the state after them in the original model, d = E|y H| / E|x H|, and the
state is multiplied by P = H diag(d) Hᵀ. A few channels of a hidden state are very large; the basis spreads them over all
channels, so that one ratio per channel is meaningful.

When to use: with any score; it rarely does harm. No weight of a decoder can hold a map of the hidden state, so the checkpoint
needs lrc to load. Cost: hidden² numbers per run of dropped layers.

Source: Chen et al., LinearPatch, arXiv 2505.24680. Widths without a Hadamard matrix: depth/repairs/hadamard.py. Differs from
the authors: x is the state of the pruned model, so that several runs fit together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import repair
from .hadamard import orthogonal


class Ratios:
    """Mean absolute values of both states in the Hadamard basis."""

    def __init__(self, width: int) -> None:
        self._basis = orthogonal(width)
        self._before, self._after = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        basis = self._basis.to(x.device)
        self._before += (x.double() @ basis).abs().sum(0).cpu()
        self._after += (y.double() @ basis).abs().sum(0).cpu()

    def change(self) -> tuple[Tensor, Tensor | None]:
        """P - I; a channel that is zero in all states is not changed."""
        ratio = torch.where(self._before > 0, self._after / self._before.clamp_min(1e-300), 1.0)
        return (self._basis * (ratio - 1)) @ self._basis.T, None


@repair("linear-patch", source="arXiv 2505.24680", on="stream")
def fit(width: int, damping: float) -> Ratios:
    """Ratios of means; nothing is solved, so damping is not used."""
    return Ratios(width)
