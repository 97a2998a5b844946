"""LoRD: the best rank-k affine map, by principal components of the centred outputs.

Minimises E‖W x - (W' x + b)‖² over all W' of rank k and all b: `W' = U Uᵀ W` with U the leading eigenvectors of the outputs'
covariance, `b = (I - U Uᵀ) E[W x]`. Centring without the bias would be a mistake: the mean would be projected too.

When to use: where the error of the outputs is what counts. On the calibration inputs it is never larger than that of `svd-llm`
at the same rank, for one more number per output. Perplexity can still be worse (docs/table.md), so measure both. The bias is
stored in the checkpoint's dtype; a target without a bias gets one, and the budget counts its bytes.

Cost: that of `svd-llm`. Statistics: a gram (input or output side) and the mean of the inputs.

Source: Kaushal et al., LoRD, arXiv 2309.14021; the same as Atomic Feature Mimicking (Yu and Wu, AAAI 2023) and LiteASR. With
`centre: false` it is `svd-llm`. Differences from published code: LoRAP's (arXiv 2404.09695) leaves the bias out, lrc never
does; the covariance is computed from means over tokens, so that no outputs need to be kept in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..base import LowRankSolution, Settings, TargetStats, balanced, method
from ..forms.base import LowRank
from ..linalg import OutputDirections, project
from ..options import Choice, Option, Shape, low_rank_options


class LordSettings(Settings):
    """Settings of `lord`."""

    centre: bool = Field(True, description="subtract the mean of the outputs, and restore it by a bias")


@dataclass(frozen=True)
class Affine(LowRankSolution):
    """Projection onto leading directions of the centred outputs; a bias restores the part of the mean outside of them."""

    weight: Tensor  # (out, in)
    directions: OutputDirections
    mean: Tensor | None  # (out,) float64, of the outputs without the module's own bias

    def form(self, choice: Choice) -> LowRank:
        basis = self.directions.basis(self.rank(choice))
        left, right = balanced(basis, project(basis, self.weight))
        if self.mean is None:
            return LowRank(left, right)
        return LowRank(left, right, self.mean - basis @ (basis.T @ self.mean))


def options(shape: Shape, settings: LordSettings, multiple: int) -> list[Option]:
    """The options of low rank, plus the bytes of a bias where the target has none."""
    extra = shape.out_features * shape.element if settings.centre and not shape.bias else 0
    found = [Option(option.choice, option.nbytes + extra) for option in low_rank_options(shape, settings, multiple)]
    return [option for option in found if option.nbytes < shape.nbytes]


@method("lord", source="arXiv 2309.14021", needs=["output_gram", "mean"], settings=LordSettings, options=options)
def solve(weight: Tensor, stats: TargetStats, settings: LordSettings) -> Affine:
    """Principal components of the outputs of a weight (out, in); energies are the eigenvalues of the outputs' covariance."""
    group = stats.group
    if not settings.centre:
        plain = stats.directions(weight)
        return Affine(plain.values, weight, plain, None)
    if group.mean is None:
        raise ValueError("lord needs the mean of the inputs")
    inputs = group.mean.double()
    mean = torch.cat([rows.double() @ inputs for rows in weight.split(512)])
    if stats.output_gram is not None:
        covariance = stats.output_gram.double() - mean[:, None] * mean[None]
        directions = OutputDirections(weight, output_gram=_positive(covariance), reference=float(stats.output_gram.trace()))
    elif group.gram is not None:
        covariance = group.gram.double() - inputs[:, None] * inputs[None]
        directions = OutputDirections(weight, _positive(covariance), reference=float(mean @ mean))
    else:
        raise ValueError("lord needs a gram of the inputs or of the outputs")
    return Affine(directions.values, weight, directions, mean)


def _positive(covariance: Tensor) -> Tensor:
    """The covariance, made symmetric. Its smallest eigenvalues may be negative by rounding; `eigh` sets them to 0."""
    return (covariance + covariance.T) / 2
