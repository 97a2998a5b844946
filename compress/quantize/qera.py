"""QERA, exact: the low-rank correction of a quantized weight with the least output error.

W ≈ Q + L R with L R the best rank-k map for the error E = W - Q in the metric of the input gram C. The paper writes it as
SVD_k(E C^{1/2}) C^{-1/2}. lrc computes the projection U_k U_kᵀ E onto the leading eigenvectors of E C Eᵀ: the same map without
an inverse, so an exactly singular gram needs no damping.

When to use: the default among corrections. The base is rounded to nearest, as published, or by GPTQ, whose error is smaller and
is corrected in the same way.

Cost: one symmetric eigenproblem per target on its smaller side (plus one per group where the output side is the larger);
`base: gptq` adds its Cholesky factor. Statistics: a gram per group.

Source: Zhang et al., QERA, arXiv 2410.06040, theorem 1 (published with 4-bit MXINT in blocks of 32, rank 32 in 16 bit). The
same map as EoRA, arXiv 2410.21271. Differences from the authors' code: the projection form; grams are means over tokens; the
base may be quantized by GPTQ.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..base import TargetStats, method
from ..forms.quantized import Quantized
from ..metric import Metric
from .corrections import Corrected, CorrectionSettings, best_correction, correction_options
from .factors import Base
from .gptq import compensator


class QeraSettings(CorrectionSettings):
    """Settings of `qera`."""

    base: Base = Field("rtn", description="how the weight is quantized")
    damping: float = Field(0.01, ge=0, le=1, description="for gptq: ridge added to the gram, relative to its mean diagonal")
    act_order: bool = Field(True, description="for gptq: inputs with the most energy first")


@method("qera", source="arXiv 2410.06040", needs=["gram"], settings=QeraSettings, options=correction_options)
def solve(weight: Tensor, stats: TargetStats, settings: QeraSettings) -> Corrected:
    """The quantized weight (out, in) and the best correction in the gram's metric; losses are mean squared output errors."""
    assert stats.group.gram is not None
    ready = None
    if settings.base == "gptq":
        ready = compensator(stats.group.gram, settings.damping, settings.act_order)
    grid = settings.base_grid
    base = ready.quantize(weight, grid) if ready else Quantized.nearest(weight, grid)
    error = best_correction(weight.double() - base.dense(), stats)
    ridge = ready.damping if ready else 0.0
    return Corrected(weight, base, error, Metric.of(stats), settings.factor_grid, ready, ridge)
