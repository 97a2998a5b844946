"""Linear algebra that several methods use, in float64 and without an inverse.

The best rank-k map in a gram's metric, `argmin tr((W - W') C (W - W')ᵀ)`, is the projection of the weight onto the leading
eigenvectors of the outputs' second moment: `W' = U_k U_kᵀ W`, U from `eigh(W C Wᵀ)` (Eckart-Young for W C^{1/2}). Whitening by
a Cholesky factor (SVD-LLM arXiv 2403.07378 §3.2) and PCA of the outputs (Swift-SVD arXiv 2604.01609) give the same map. Here it
takes no inverse and no Cholesky factor, so an exactly singular gram is no special case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError


@dataclass(frozen=True)
class Eigen:
    """Eigenpairs of a symmetric positive semidefinite matrix in descending order: values (n,), vectors (n, n), float64."""

    values: Tensor
    vectors: Tensor

    def root(self) -> Tensor:
        """The symmetric square root of the matrix, (n, n) float64."""
        return (self.vectors * self.values.sqrt()) @ self.vectors.T


def eigh(matrix: Tensor, what: str = "matrix") -> Eigen:
    """Eigenpairs of a symmetric positive semidefinite (n, n) matrix, in float64, descending; negative eigenvalues become 0.

    Raises:
        NonFiniteError: the matrix holds a NaN or an infinity (LAPACK would return garbage or hang).
    """
    if not torch.isfinite(matrix).all():
        raise NonFiniteError(f"The {what} ({matrix.shape[0]} x {matrix.shape[1]}) is not finite.", "Its statistics overflowed.")
    values, vectors = torch.linalg.eigh(matrix.double())  # reads the lower triangle only
    return Eigen(values.flip(0).clamp_min_(0), vectors.flip(1))


def root(gram: Tensor) -> Tensor:
    """The symmetric square root S of a gram, S S = gram, (n, n) float64; the gram may be singular."""
    return eigh(gram, "gram").root()


class OutputDirections:
    """The leading output directions of a target: eigenvectors of `W C Wᵀ`, computed once for all ranks.

    Where the target is tall (out > in) the problem is solved on the (in, in) side with the gram's root S: the eigenvectors V of
    `S WᵀW S` have the same eigenvalues, and the columns of `W S V` are the wanted directions up to their lengths. A wide target
    needs no root (an eigenproblem of the larger side). Float64 work is done on slices of the weight, so that no float64 copy of
    a large weight is made.

    Args:
        weight: (out, in), any floating dtype.
        gram: (in, in) the input gram C; used where `output_gram` is not given.
        output_gram: (out, out) mean over tokens of y yᵀ, y = W x.
        gram_root: returns the symmetric root of `gram`, so that targets can share it; None: it is computed here.
        reference: an energy, on the scale of the eigenvalues, that sets the size of rounding errors in the statistics: for
            centred outputs their energy before the mean was subtracted.
    """

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor | None = None,
        output_gram: Tensor | None = None,
        *,
        gram_root: Callable[[], Tensor] | None = None,
        reference: float = 0.0,
    ) -> None:
        self._weight = weight
        out_features, in_features = weight.shape
        self._vectors: Tensor | None = None
        self._inner: Tensor | None = None
        if output_gram is None and gram is None:
            raise ValueError("OutputDirections needs the gram of the inputs or that of the outputs")
        if output_gram is None and gram is not None and out_features <= in_features:
            output_gram = outputs_of(weight, gram)
        if output_gram is not None:
            eigen = eigh(output_gram, "output gram")
            self._vectors = eigen.vectors
        elif gram is not None:
            side = root(gram) if gram_root is None else gram_root()
            eigen = eigh(side @ outer_rows(weight) @ side, "weighted gram")
            self._inner = side @ eigen.vectors
        self.values = eigen.values[: min(out_features, in_features)]
        largest = max(float(self.values[0]) if len(self.values) else 0.0, reference)
        self._seen = int((self.values > largest * _SEEN).sum())

    def basis(self, rank: int) -> Tensor:
        """(out, rank) float64 with orthonormal columns, the leading directions in descending order of energy.

        Some directions have no energy where there are fewer calibration tokens than input features. They are ordered by the
        plain norm of the weight in them: any order is optimal in the metric, and this one serves unseen inputs best.
        """
        seen = min(rank, self._seen)
        if self._vectors is not None:
            kept, free = self._vectors[:, :seen], self._vectors[:, self._seen :]
            if rank == seen:
                return kept
            held = free.T @ self._weight.double()
            return torch.cat([kept, free @ eigh(held @ held.T).vectors[:, : rank - seen]], dim=1)
        assert self._inner is not None
        # the columns are orthogonal already, with descending lengths; Householder QR does not divide by the small lengths
        kept, _ = torch.linalg.qr(self._weight_times(self._inner[:, :seen]))
        if rank == seen:
            return kept
        rest = self._weight.double() - kept @ (kept.T @ self._weight.double())
        more, _ = torch.linalg.qr(rest @ eigh(rest.T @ rest).vectors[:, : rank - seen])
        more = more - kept @ (kept.T @ more)
        return torch.linalg.qr(torch.cat([kept, more], dim=1))[0]

    def energies(self, rows: slice) -> Tensor:
        """(k,) float64, the share of each of `values` that these rows of the weight contribute; all rows add up to `values`."""
        if self._vectors is not None:
            return self.values * self._vectors[rows, : len(self.values)].square().sum(0)
        assert self._inner is not None
        parts = (part.double() @ self._inner for part in self._weight[rows].split(_ROWS))
        return torch.stack([part.square().sum(0) for part in parts]).sum(0)[: len(self.values)]

    def _weight_times(self, matrix: Tensor) -> Tensor:
        return torch.cat([rows.double() @ matrix for rows in self._weight.split(_ROWS)])


_ROWS = 512
# Below this fraction of the largest eigenvalue, rounding rotates an eigenvector so far (eps / fraction) that an exact
# reconstruction is no longer possible; float32 statistics carry no information there anyway.
_SEEN = 1e-9


def outer_rows(weight: Tensor) -> Tensor:
    """`WᵀW` in float64, (in, in), computed by slices of rows."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.split(_ROWS):
        doubled = rows.double()
        total.addmm_(doubled.T, doubled)
    return total


def outputs_of(weight: Tensor, gram: Tensor) -> Tensor:
    """`W C Wᵀ` in float64, (out, out): the second moment of the outputs from the input gram, computed by slices of the gram."""
    total = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=weight.device)
    wide = weight.double()
    for columns, read in zip(gram.split(_ROWS, dim=1), wide.split(_ROWS, dim=1), strict=True):
        total.addmm_(wide @ columns.to(wide), read.T)
    return (total + total.T) / 2


def project(basis: Tensor, weight: Tensor) -> Tensor:
    """`basisᵀ weight` in float64, (rank, in), computed by slices of rows."""
    total = torch.zeros(basis.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for directions, rows in zip(basis.split(_ROWS), weight.split(_ROWS), strict=True):
        total.addmm_(directions.T, rows.double())
    return total
