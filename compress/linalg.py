"""The linear algebra that methods share, in float64 and without an inverse.

The best rank-k map in a gram's metric, `argmin tr((W - W') C (W - W')ᵀ)`, is the projection of the weight onto the leading
eigenvectors of the outputs' second moment: `W' = U_k U_kᵀ W`, U from `eigh(W C Wᵀ)` (Eckart-Young for W C^{1/2}; the same
map that whitening by a Cholesky factor gives, SVD-LLM arXiv 2403.07378 §3.2, and that PCA of the outputs gives, Swift-SVD
arXiv 2604.01609). No inverse and no Cholesky factor: an exactly singular gram is as good as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError


@dataclass(frozen=True)
class Eigen:
    """Eigenpairs of a symmetric positive semidefinite matrix in descending order: values (n,), vectors (n, n), float64."""

    values: Tensor
    vectors: Tensor


def eigh(matrix: Tensor, what: str = "matrix") -> Eigen:
    """Eigenpairs of a symmetric positive semidefinite (n, n) matrix, in float64, descending, negatives rounded up to 0.

    Raises:
        NonFiniteError: the matrix holds a NaN or an infinity (LAPACK would return garbage or not return).
    """
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(f"The {what} ({matrix.shape[0]} x {matrix.shape[1]}) is not finite.", "Its statistics overflowed.")
    doubled = matrix.double()
    values, vectors = torch.linalg.eigh((doubled + doubled.T) / 2)
    return Eigen(values.flip(0).clamp_min_(0), vectors.flip(1))


def root(gram: Tensor) -> Tensor:
    """The symmetric square root S of a gram, S S = gram, (n, n) float64; singular grams included."""
    eigen = eigh(gram, "gram")
    return (eigen.vectors * eigen.values.sqrt()) @ eigen.vectors.T


def output_eigen(weight: Tensor, gram_root: Tensor | None = None, output_gram: Tensor | None = None) -> Eigen:
    """Eigenpairs of `W C Wᵀ`, the second moment of a target's outputs, computed on the smaller side.

    Args:
        weight: (out, in).
        gram_root: (in, in) the symmetric root of the input gram C; used where `output_gram` is not given.
        output_gram: (out, out) mean over tokens of y yᵀ, y = W x.

    Returns:
        values (k,) and vectors (out, k), k = min(out, in) or out; the columns are orthonormal and complete: directions that
        carry no energy are ordered by the plain norm of what the weight still holds there.
    """
    if output_gram is not None:
        return _complete(eigh(output_gram, "output gram"), weight)
    if gram_root is None:
        raise ValueError("output_eigen needs gram_root or output_gram")
    scaled = weight.double() @ gram_root.double()  # (out, in)
    out_features, in_features = scaled.shape
    if out_features <= in_features:
        return _complete(eigh(scaled @ scaled.T, "output gram"), weight)
    inner = eigh(scaled.T @ scaled, "weighted gram")  # (in, in): the same nonzero eigenvalues
    # Householder QR of columns that are orthogonal already and fall in length gives U without dividing by small values
    vectors, _ = torch.linalg.qr(scaled @ inner.vectors)
    return _complete(Eigen(inner.values, vectors), weight)


def _complete(eigen: Eigen, weight: Tensor) -> Eigen:
    """Order the directions without energy by the weight's plain norm in them.

    Calibration that saw fewer tokens than the target is wide leaves such directions; any order of them is optimal in the
    metric, and the one that serves unseen inputs best is that of the weight itself.
    """
    values, vectors = eigen.values, eigen.vectors
    if not len(values):
        return eigen
    seen = int((values > values[0] * len(values) * torch.finfo(torch.float64).eps).sum())
    if seen == vectors.shape[1]:
        return eigen
    kept = vectors[:, :seen]
    rest = weight.double() - kept @ (kept.T @ weight.double())
    left, _, _ = torch.linalg.svd(rest, full_matrices=False)
    both, _ = torch.linalg.qr(torch.cat([kept, left], dim=1)[:, : vectors.shape[1]])
    signs = torch.sign((both[:, :seen] * kept).sum(0))  # QR may flip what it was given
    both[:, :seen] *= torch.where(signs == 0, torch.ones_like(signs), signs)
    return Eigen(values, both)
