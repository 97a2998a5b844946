"""YAQA: a code with error feedback in the metric of the loss: inputs and output gradients, not the inputs alone.

As `trellis`, with the error of a weight measured by ½ tr(G ΔW C ΔWᵀ), C the gram of the inputs and G that of the output
gradients: the Kronecker-factored approximation of what the model's loss gains. Tiles compensate for the errors of those to
their left and above them.

When to use: at 2 to 4 bits, where a backward pass is affordable. Losses are in nats, so that `allocation: fisher` and `kl`
compare targets without further scaling.

Cost: as `trellis`, twice its products, and the backward pass. Statistics: a gram per group, and the gradients' gram (out, out)
per target. It is shrunk towards its mean diagonal (`shrink_grad`), because the Fisher matrix of few tokens has low rank.

Source: Tseng et al., YAQA, arXiv 2505.22988. Differences from the authors' code: C and G are those of `kfac` (plain means over
tokens, not the power iteration on the Fisher matrix by which their sketch B weighs tokens); G is of drawn labels of the same
windows; codes, scales and rotation are those of `trellis`.
"""

from __future__ import annotations

from functools import partial

from pydantic import Field
from torch import Tensor

from ..base import TargetStats, method
from ..low_rank.kfac import shrunk
from ..metric import Metric
from ..options import coarsest
from .encoding.two_sided import encode_two_sided
from .gptq import compensator
from .trellis import CodeSettings, InCode, code_options, seed_of, turned, turned_gram


class YaqaSettings(CodeSettings):
    """Settings of `yaqa`."""

    shrink_grad: float = Field(
        0.3, gt=0, le=1, description="fraction of the gradients' gram that is replaced by its mean diagonal; 1: as `trellis`"
    )


@method(
    "yaqa",
    source="arXiv 2505.22988",
    needs=["gram", "grad_gram"],
    settings=YaqaSettings,
    options=code_options,
    measured=coarsest(3),
    power=2,
)
def solve(weight: Tensor, stats: TargetStats, settings: YaqaSettings) -> InCode:
    """The weight (out, in) in a code, tile by tile in the metric of the loss; losses are in nats per token."""
    gram, gradients = stats.group.gram, stats.grad_gram
    assert gram is not None
    assert gradients is not None
    seed = seed_of(weight, settings.seed) if settings.rotate else None
    wanted, outputs = turned(weight, seed), shrunk(gradients, settings.shrink_grad)
    ready = compensator(turned_gram(gram, seed), settings.damping, act_order=False)
    above = compensator(turned_gram(outputs, None if seed is None else seed + 1), 0, act_order=False)
    encode = partial(encode_two_sided, wanted, ready.factor, above.factor)
    return InCode(weight, settings, Metric.of(stats), encode, seed, ready.damping, outputs / 2)
