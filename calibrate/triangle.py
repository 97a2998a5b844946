"""Symmetric matrices as they lie on disk: the upper triangle, row after row, half of the bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROWS = 128  # that are mirrored together


def packed(matrix: Tensor) -> Tensor:
    """(n, n), symmetric -> (n (n + 1) / 2,) on the CPU, its upper triangle."""
    n, held = len(matrix), matrix.cpu()
    return torch.cat([held[row, row:] for row in range(n)])


def unpacked(triangle: Tensor) -> Tensor:
    """The symmetric matrix (n, n) of an upper triangle (n (n + 1) / 2,).

    Raises:
        ValueError: no triangle has so many entries.
    """
    n = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    if n * (n + 1) // 2 != len(triangle):
        raise ValueError(f"{len(triangle)} numbers are no triangle of a matrix")
    matrix = triangle.new_empty(n, n)
    for row, part in enumerate(triangle.split([n - row for row in range(n)])):
        matrix[row, row:] = part
    for start in range(0, n, _ROWS):  # a column at a time would touch every line of memory n times
        stop = min(start + _ROWS, n)
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix
