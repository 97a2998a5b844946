"""Linearity: the layers that are nearest to a linear map of their input are dropped.

The linearity of a layer is 1 - min over A of ‖X A - Y‖² of the centred and normalised inputs and outputs X and Y (tokens,
hidden); a layer that only turns and scales the state counts as linear even where its influence by cosine is large.

When to use: together with block influence; where both choose the same layers, little is lost. Cost: one forward over a few
tokens (at least two per channel, or every layer looks linear) and one least-squares problem per layer.

Source: Razzhigaev et al., Your Transformer is Secretly Linear, arXiv 2405.12250 (generalised Procrustes similarity).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import CalibrationError
from ..base import MayGo, anything, cheapest, score

_PER_CHANNEL = 2  # tokens; with only as many tokens as channels, every layer looks linear


def linearity(x: Tensor, y: Tensor) -> float:
    """1 - relative error of the best linear map between centred states (tokens, hidden); 1 is linear."""
    x, y = (each.to(torch.float64, copy=True).flatten(0, -2) for each in (x, y))
    if len(x) < _PER_CHANNEL * x.shape[1]:
        raise CalibrationError(
            f"Linearity of layers of width {x.shape[1]} needs {_PER_CHANNEL * x.shape[1]} tokens or more; there are {len(x)}.",
            "Raise --samples or --length, or use another score.",
        )
    for each in (x, y):
        each.sub_(each.mean(0)).div_(each.norm())
    solution = torch.linalg.lstsq(x, y, driver="gelsd").solution
    return 1 - float((x @ solution - y).square().sum())


@score("linearity", source="arXiv 2405.12250", tokens_per_channel=_PER_CHANNEL)
def choose(boundaries: Sequence[Tensor], candidates: Sequence[int], count: int, may_go: MayGo = anything) -> list[int]:
    """The `count` most linear candidates."""
    found = {layer: -linearity(boundaries[layer], boundaries[layer + 1]) for layer in candidates}
    return cheapest(found, count, may_go)
