"""Block influence: the layers that turn the hidden state least are dropped, neighbours or not.

The influence of a layer is 1 - E[cos(x, y)] over tokens, x its input and y its output.

When to use: as a quick first look. Cost: one forward over a few tokens.

Source: Men et al., ShortGPT, arXiv 2403.03853. Per token, as the paper defines it; some re-implementations flatten samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..base import MayGo, anything, cheapest, score


def influences(boundaries: Sequence[Tensor]) -> list[float]:
    """1 - mean cosine between each layer's input and output, one number per layer."""
    return [1 - float(torch.cosine_similarity(x.double(), y.double(), dim=-1).mean()) for x, y in pairwise(boundaries)]


@score("block-influence", source="arXiv 2403.03853", by_cosine=True)
def choose(boundaries: Sequence[Tensor], candidates: Sequence[int], count: int, may_go: MayGo = anything) -> list[int]:
    """The `count` candidates of least influence."""
    influence = influences(boundaries)
    return cheapest({layer: influence[layer] for layer in candidates}, count, may_go)
