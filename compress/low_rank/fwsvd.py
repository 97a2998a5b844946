"""FWSVD: singular value decomposition after scaling each input channel by its Fisher information.

Input channels whose weights matter more to the loss get a larger weight: the method decomposes W S with
S = diag(√(E Σ_out (∂loss/∂W)²)), then divides S out of the right factor. All entries of a channel are given the Fisher
information of the whole channel, because the problem has a closed-form solution only if rows or columns are scaled as a whole.

When to use: to compare with published FWSVD results. On decoders it fails where `svd-llm` and `kfac`, which use the inputs, do
not (LLaMA-7B at 20 %: perplexity 1727, D-Rank arXiv 2509.25622).

Cost: a backward pass, and one SVD per target; statistics: (in,) per target.

Source: Hsu et al., Language Model Compression with Weighted Low-Rank Factorization, ICLR 2022 (arXiv 2207.00112), eq. 5-7; the
paper writes y = x W, so its rows are the input channels. Differences from the paper: a channel without gradient gets the
smallest positive scale (its column of the right factor stays finite), and there is no fine-tuning before or after.
"""

from __future__ import annotations

from torch import Tensor

from ..base import Factored, Settings, TargetStats, method
from .svd import scaled_svd


@method("fwsvd", source="arXiv 2207.00112", needs=["fisher_in"])
def solve(weight: Tensor, stats: TargetStats, settings: Settings) -> Factored:
    """Truncated SVD of W S (out, in); energies are squared singular values, errors in the scaled metric."""
    if stats.fisher_in is None:
        raise ValueError("fwsvd needs fisher_in, the squared gradients of the weight's input channels")
    return scaled_svd(weight, stats.fisher_in.double().sqrt())
