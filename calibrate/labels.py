"""Labels drawn from a model's own distribution, the same for a sample whatever batch it is in."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import derived_seed


def uniforms(seed: int, sample: int, length: int) -> Tensor:
    """The random numbers in [0, 1) that choose a sample's labels, (length,) float64; a sample's own, whatever its batch."""
    return torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(derived_seed(seed, sample)))


def draw(p: Tensor, u: Tensor) -> Tensor:
    """The label at which the cumulative distribution of each row of `p` (rows, words) passes `u` (rows,)."""
    cumulative = p.double().cumsum(-1)
    labels = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return labels.clamp_max(p.shape[-1] - 1)
