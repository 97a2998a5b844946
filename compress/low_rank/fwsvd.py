"""FWSVD: singular value decomposition after scaling each input channel by its Fisher information.

Input channels whose weights the loss feels more count more: SVD of W S with S = diag(√(E Σ_out (∂loss/∂W)²)), then S is
divided out of the right factor. The Fisher information of a whole channel stands for that of its entries, because only a
scaling of rows or columns leaves the problem solvable in closed form.

When to use: to compare with published FWSVD results. On decoders it fails where `svd-llm` and `kfac`, which look at the inputs,
do not (LLaMA-7B at 20 %: perplexity 1727, D-Rank arXiv 2509.25622).

Cost: a backward pass, and one SVD per target; statistics: (in,) per target.

Source: Hsu et al., Language Model Compression with Weighted Low-Rank Factorization, ICLR 2022 (arXiv 2207.00112), eq. 5-7; its
rows are the input channels, since it writes y = x W. Difference from the paper: a channel without gradient is scaled by the
least positive one (its column stays finite in the right factor), and there is no fine-tuning before or after.
"""

from __future__ import annotations

from torch import Tensor

from ..base import Factored, Settings, TargetStats, method
from .scaled import scaled_svd


@method("fwsvd", source="arXiv 2207.00112", needs=["fisher_in"])
def solve(weight: Tensor, stats: TargetStats, settings: Settings) -> Factored:
    """Truncated SVD of W S (out, in); energies are squared singular values, an error in the scaled metric."""
    if stats.fisher_in is None:
        raise ValueError("fwsvd needs fisher_in, the squared gradients of the weight's input channels")
    return scaled_svd(weight, stats.fisher_in.double().sqrt())
