"""Angular distance: the run of neighbouring layers across which the hidden state turns least is dropped.

The distance across a run of n layers that begins with layer l is E[arccos(cos(x_l, x_{l+n}))] / π: `angular` takes it at each
sample's last token, `angular-all` at every token.

When to use: as the published baseline; read the warning in depth/base.py. Cost: one forward over a few tokens.

Source: Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887: the last token. All tokens: Chen
et al., LLM-Streamline, arXiv 2403.19135, which take the mean cosine, where here it is the mean angle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import MayGo, anything, runs, score


def distance(x: Tensor, y: Tensor) -> float:
    """Mean angle between states (…, hidden), divided by π."""
    cosine = torch.cosine_similarity(x.double(), y.double(), dim=-1)
    return float(torch.arccos(cosine.clamp(-1, 1)).mean()) / math.pi


@score("angular", source="arXiv 2403.17887", by_cosine=True, one_run=True)
def choose(boundaries: Sequence[Tensor], candidates: Sequence[int], count: int, may_go: MayGo = anything) -> list[int]:
    """The run of `count` neighbouring candidates across which samples' last tokens turn least."""
    return _run([states[:, -1] for states in boundaries], candidates, count, may_go)


@score("angular-all", source="arXiv 2403.19135", by_cosine=True, one_run=True)
def choose_by_all(boundaries: Sequence[Tensor], candidates: Sequence[int], count: int, may_go: MayGo = anything) -> list[int]:
    """The run of `count` neighbouring candidates across which all tokens turn least, on average."""
    return _run(boundaries, candidates, count, may_go)


def _run(boundaries: Sequence[Tensor], candidates: Sequence[int], count: int, may_go: MayGo) -> list[int]:
    starts = runs(candidates, count, may_go)
    best = min(starts, key=lambda first: (distance(boundaries[first], boundaries[first + count]), first))
    return list(range(best, best + count))
