"""The spectrum and the outliers of one weight matrix: how far low rank can take it, and how hard it is to round.

A spectrum is either the weight's own (its singular values) or that of its outputs on calibration tokens: with C the gram of its
inputs, the energies are the eigenvalues of `W C Wᵀ`. The best rank-k map in that metric keeps exactly the k largest of them;
this is what `svd-llm` keeps (compress/linalg.py).

    effective rank   exp(H(p)), p_i = σ_i² / Σσ², H the entropy in nats: how many equal singular values have this entropy.
                     The same definition as in the allocation rule `effective-rank` (D-Rank, arXiv 2509.25622).
    energy kept      Σ_{i ≤ k} σ_i² / Σσ² at the rank k that a ratio allows. What is missing to 1 is the relative squared error
                     of the outputs; for the weight's own spectrum that holds for inputs without preferred directions.
    largest          max |w| / rms(w).
    kurtosis         mean(w⁴) / mean(w²)²: 3 for a normal distribution, more with heavy tails.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compress.linalg import outer_rows, outputs_of
from ..compress.options import Shape, low_rank_options
from ..errors import NonFiniteError

RATIOS = (0.2, 0.4, 0.6)
POINTS = 64  # of a spectrum that are kept; the numbers above are computed from all singular values
_ROWS = 512


@dataclass(frozen=True)
class Spectrum:
    """A spectrum in numbers.

    Args:
        effective_rank: between 1 and the smaller side; 0 of a matrix of zeros.
        energy: fraction of the energy that is kept, at each of `RATIOS`.
        points: (rank, singular value, energy kept at that rank), at evenly spaced ranks with the first and the last.
    """

    effective_rank: float
    energy: tuple[float, ...]
    points: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Outliers:
    """How far the largest weights are from the others."""

    largest: float
    kurtosis: float


def rank_at(shape: Shape, ratio: float) -> int:
    """The rank of two factors within 1 - ratio of the matrix's bytes, as a plan counts them; 0 where none is so small."""
    allowed = int((1 - ratio) * shape.nbytes + 1e-6)  # as plan/knapsack.py
    ranks = [option.choice.rank or 0 for option in low_rank_options(shape, None) if option.nbytes <= allowed]
    return ranks[-1] if ranks else 0


def energies(
    weight: Tensor, gram: Tensor | None = None, output_gram: Tensor | None = None, gram_root: Tensor | None = None
) -> Tensor:
    """Squared singular values, descending, (min(out, in),) float64; precise to some 1e-15 of the largest.

    Args:
        weight: (out, in), any floating dtype.
        gram: (in, in) of the inputs; without it and `output_gram` the spectrum is the weight's own.
        output_gram: (out, out) of the outputs; takes the place of `gram`.
        gram_root: (in, in) the symmetric root of `gram`, for a weight with more outputs than inputs.

    Raises:
        NonFiniteError: a gram holds a NaN or an infinity.
    """
    out_features, in_features = weight.shape
    if output_gram is not None:
        side = output_gram.double()
    elif gram is None:
        side = outer_rows(weight if in_features <= out_features else weight.T)
    elif gram_root is None:
        side = outputs_of(weight, gram)
    else:
        side = gram_root @ outer_rows(weight) @ gram_root
    if not torch.isfinite(side).all():
        raise NonFiniteError(f"A gram of {tuple(side.shape)} is not finite.", "Its statistics overflowed.")
    values: Tensor = torch.linalg.eigvalsh(side)
    return values.flip(0).clamp_min_(0)[: min(out_features, in_features)]


def spectrum(values: Tensor, ranks: tuple[int, ...]) -> Spectrum:
    """A spectrum in numbers.

    Args:
        values: (n,) float64 squared singular values, descending.
        ranks: one for each of `RATIOS`.
    """
    total = float(values.sum())
    if total <= 0:
        return Spectrum(0.0, (1.0,) * len(ranks), ((len(values), 0.0, 1.0),))
    shares = values / total
    kept = shares.cumsum(0).clamp_max(1.0)
    entropy = float(torch.special.entr(shares).sum())
    count = min(POINTS, len(values))
    places = sorted({round(i * (len(values) - 1) / max(1, count - 1)) for i in range(count)})
    points = tuple((place + 1, float(values[place].sqrt()), float(kept[place])) for place in places)
    energy = tuple(float(kept[rank - 1]) if rank else 0.0 for rank in ranks)
    return Spectrum(float(torch.tensor(entropy, dtype=torch.float64).exp()), energy, points)


def outliers(weight: Tensor) -> Outliers:
    """The outliers of a weight (out, in); sums in float64, by slices of rows. A weight of zeros has none (0 and 0)."""
    second = fourth = largest = 0.0
    for rows in weight.split(_ROWS):
        squares = rows.double().square()
        second += float(squares.sum())
        fourth += float(squares.square().sum())
        largest = max(largest, float(squares.max()))
    if second == 0:
        return Outliers(0.0, 0.0)
    mean = second / weight.numel()
    return Outliers((largest / mean) ** 0.5, fourth / weight.numel() / mean**2)
