"""Hadamard matrices for the hidden sizes of models, and an orthogonal substitute for sizes that have none.

Sylvester's doubling gives the powers of two (`scipy.linalg.hadamard`), but most hidden sizes are none (576, 896, 2304, 3584,
5120 …). Paley's two constructions, from the squares modulo a prime, give a matrix of such a size, or of what is left when some
factors of two, which Sylvester's doubling supplies, are divided out (576 = 8 · 72). Where neither exists (odd widths, 4 · 23 …)
the orthonormal cosine transform is used: it too spreads a single large coordinate over all others, though not evenly.

Source: R. Paley, On orthogonal matrices, J. Math. Phys. 12 (1933).
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from torch import Tensor


def orthogonal(width: int) -> Tensor:
    """(width, width) float64 with orthonormal columns: a Hadamard matrix over the root of its size, or the cosine transform."""
    found = hadamard(width)
    if found is None:
        return torch.from_numpy(scipy.fft.dct(np.eye(width), norm="ortho", axis=0))
    return torch.from_numpy(found / np.sqrt(width))


def hadamard(size: int) -> np.ndarray | None:
    """(size, size) float64 of 1 and -1 with orthogonal columns; None for a size that these constructions do not give."""
    doubled, base = 1, size  # a power of two takes Sylvester's matrix, as in the papers
    while True:
        found = _base(base)
        if found is not None:
            return np.kron(scipy.linalg.hadamard(doubled), found).astype(np.float64)
        if base % 2:
            return None
        doubled, base = 2 * doubled, base // 2


def _base(size: int) -> np.ndarray | None:
    if size & (size - 1) == 0:
        return scipy.linalg.hadamard(size)
    if size % 4 == 0 and _is_prime(size - 1):  # 4 divides the size, so that the prime is 3 modulo 4
        return _paley_one(size - 1)
    if size % 4 == 0 and (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        return _paley_two(size // 2 - 1)
    return None


def _jacobsthal(prime: int) -> np.ndarray:
    """Entry (i, j) is 1 where i - j is a square modulo the prime, 0 where it is 0, else -1."""
    character = np.full(prime, -1.0)
    character[[number * number % prime for number in range(1, prime)]] = 1
    character[0] = 0
    return character[(np.arange(prime)[:, None] - np.arange(prime)) % prime]


def _paley_one(prime: int) -> np.ndarray:
    bordered = np.zeros((prime + 1, prime + 1))
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1, -1, _jacobsthal(prime)
    return bordered + np.eye(prime + 1)


def _paley_two(prime: int) -> np.ndarray:
    bordered = np.ones((prime + 1, prime + 1))
    bordered[0, 0], bordered[1:, 1:] = 0, _jacobsthal(prime)
    return np.kron(bordered, [[1, 1], [1, -1]]) + np.kron(np.eye(prime + 1), [[1, -1], [-1, -1]])


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
