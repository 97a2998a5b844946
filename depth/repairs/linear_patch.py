"""LinearPatch: the hidden state at the cut gets back, channel by channel of a Hadamard basis, the size that it had.

With x the state that reaches the cut and y the state that the dropped layers made of it, d = E|y H| / E|x H| and the state is
multiplied by P = H diag(d) Hᵀ. Few channels of a hidden state are huge; the basis spreads them over all channels, so that one
ratio per channel means something.

When to use: with any score; it cannot do much harm. It is a map of the hidden state, which no weight of a decoder holds, so the
checkpoint needs lrc to load. Cost: hidden² numbers per run of dropped layers.

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
        """P - I; a channel that no state reaches stays as it is."""
        ratio = torch.where(self._before > 0, self._after / self._before.clamp_min(1e-300), 1.0)
        return (self._basis * (ratio - 1)) @ self._basis.T, None


@repair("linear-patch", source="arXiv 2505.24680", on="stream")
def fit(width: int, damping: float) -> Ratios:
    """Nothing is solved, so that damping has no part in it."""
    return Ratios(width)
