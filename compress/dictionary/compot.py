"""COMPOT: a sparse code over an orthogonal dictionary, learned in closed form.

Each row of the weight becomes a sum of a few orthogonal atoms. Different outputs may thus use different subspaces, while low
rank gives the same subspace to all outputs. With an orthonormal dictionary D both subproblems have exact solutions: the best
codes are the largest entries of `points D`, and the best D for given codes is the orthogonal factor of `pointsᵀ codes`
(Procrustes). The method alternates between the two, starting from the basis of the truncated SVD; neither step can raise the
loss.

When to use: instead of `svd-llm`, where size matters more than speed. At equal bytes its loss is clearly lower, and it is far
cheaper than `cospadi`. Its forward pass is slower than the dense one for single tokens (benchmarks/cost/dictionary.py).

Cost: that of `svd-llm`, plus per iteration two multiplications of (out, r) by (r, k) and one SVD of (r, k), r = min(out, in).
A 1536 x 576 target takes some 4 s on one core, and half as much again if splits are compared (`auto`). All work is in float64:
float32 agrees to 1e-5 of the total and saves little. Statistics: as for `svd-llm`.

Source: COMPOT, arXiv 2602.15200; orthogonal dictionary, hard threshold and Procrustes, SVD start, 20 iterations, k/s = 2.
Differences from the paper: the kept codes are the largest of the whole target, not equally many in each row (`share: row`
does that); once the dictionary is found, values and atoms are refitted by least squares in turn (`refits`), which lowers the
loss and makes the atoms no longer orthogonal; there are at most min(out, in) atoms, and a larger budget adds nonzeros instead;
no gram is inverted (sparse_coding.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..base import TargetStats, method
from ..forms.dictionary import Pattern
from ..options import at_sizes
from .sparse_coding import (
    Coded,
    DictionarySettings,
    DictionarySolution,
    Problem,
    Split,
    dictionary_options,
    most_atoms,
    refined,
)

Share = Literal["target", "row"]
_STAGES = (3, 8)  # iterations after which splits are compared and the better half is kept


class CompotSettings(DictionarySettings):
    """Settings of `compot`."""

    iterations: int = Field(20, ge=0, le=10_000, description="of thresholding and Procrustes in turn")
    share: Share = Field("target", description="keep the largest codes of the whole target, or equally many in each row")

    @model_validator(mode="after")
    def _rows_fit(self) -> CompotSettings:
        if self.share == "row" and self.atoms_per_nonzero == "auto":
            raise ValueError("equally many codes in each row cannot fill the same bytes at every split: give atoms_per_nonzero")
        return self


def largest(codes: Tensor, count: int, share: Share = "target", pattern: Pattern = "free") -> Tensor:
    """The mask (out, k) of the `count` codes with the most energy: the exact optimum for an orthonormal dictionary.

    Args:
        count: of the whole target; divided evenly among the rows where `share` is 'row'; ignored for 2:4.
    """
    mask = torch.zeros(codes.shape, dtype=torch.bool, device=codes.device)
    if pattern == "2:4":
        groups = codes.abs().reshape(-1, 4)
        return mask.view(-1, 4).scatter_(1, groups.topk(2).indices, True).view(codes.shape)
    if share == "row":
        return mask.scatter_(1, codes.abs().topk(count // len(codes), dim=1).indices, True)
    mask.view(-1)[codes.abs().flatten().topk(count, sorted=False).indices] = True
    return mask


def procrustes(points: Tensor, codes: Tensor) -> Tensor:
    """(r, k) with orthonormal columns: argmin ‖points - codes Dᵀ‖."""
    left, _, right = torch.linalg.svd(points.T @ codes, full_matrices=False)
    return left @ right


class _Search:
    """The search with one split (atoms, nonzeros). Between calls it keeps its dictionary (r, atoms), not the larger codes."""

    def __init__(self, points: Tensor, split: Split, share: Share, pattern: Pattern) -> None:
        atoms, self._nonzeros = split
        self._points, self._share, self._pattern = points, share, pattern
        self._dictionary = torch.eye(points.shape[1], atoms, dtype=points.dtype, device=points.device)
        self.sparse = self._nonzeros < len(points) * atoms  # without zeros the start is already optimal

    def go(self, iterations: int) -> tuple[Tensor, Tensor]:
        """Procrustes and thresholding in turn. Returns codes (out, atoms), zero outside the mask, and the mask."""
        codes, mask = self._coded()
        for _ in range(iterations if self.sparse else 0):
            self._dictionary = procrustes(self._points, codes)
            codes, mask = self._coded()
        return codes, mask

    def _coded(self) -> tuple[Tensor, Tensor]:
        codes = self._points @ self._dictionary
        mask = largest(codes, self._nonzeros, self._share, self._pattern)
        return codes.mul_(mask), mask


def learn(
    problem: Problem, splits: Sequence[Split], iterations: int, refits: int, share: Share = "target", pattern: Pattern = "free"
) -> Coded:
    """The codes of the best split, refined at the end.

    All splits are tried for three iterations, the better half of them for eight; the best one is then run to the end.
    """
    left = [_Search(problem.points, split, share, pattern) for split in splits]
    done = 0
    for stage in (min(each, iterations) for each in _STAGES):
        if len(left) > 1:
            losses = {search: refined(problem, *search.go(stage - done), 0).loss for search in left}
            done = stage
            left = sorted(left, key=lambda search: losses[search])[: math.ceil(len(left) / 2)]
    best = left[0]
    codes, mask = best.go(iterations - done)
    return refined(problem, codes, mask, refits if best.sparse else 0)


@method(
    "compot",
    source="arXiv 2602.15200",
    needs=["output_gram"],
    settings=CompotSettings,
    options=dictionary_options,
    measured=at_sizes(0.3, 0.6),
)
def solve(weight: Tensor, stats: TargetStats, settings: CompotSettings) -> DictionarySolution:
    """An orthogonal dictionary for the weight (out, in), in the metric of the calibration inputs."""

    def learned(problem: Problem, splits: Sequence[Split]) -> Coded:
        """Codes of the best split."""
        return learn(problem, splits, settings.iterations, settings.refits, settings.share, settings.pattern)

    return DictionarySolution(weight, Problem.of(weight, stats), settings, learned, most_atoms(*weight.shape))
