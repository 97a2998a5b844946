"""Incoherence: a random rotation that spreads what a vector holds evenly over its entries, at the cost of a fast transform.

`Q x = H (s · x)` with random signs s and H = (Hadamard of a power of two) ⊗ (Hartley of the odd factor), both symmetric and
orthogonal, so that H is its own inverse. 576 = 64 · 9 and 1536 = 512 · 3. After a rotation of both sides a weight's entries
look like draws from one Gaussian, whatever outliers it had: a code with one scale fits them.

Source: the randomized Hadamard transform of QuIP#, arXiv 2402.04396, §3. There, a size that is no power of two gets a Hadamard
matrix of another order or a Fourier transform of the whole; the Hartley transform (cas θ = cos θ + sin θ) of the odd factor
alone is real, exists for every size, and its entries are at most √2 times those of a Hadamard matrix.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .constants import table

_FACTOR = 64  # a power of two is applied in steps of at most this size, each one a multiplication by a small matrix
WIDEST = 128  # above it the odd factor is a fast Fourier transform
_NARROW = 16  # columns up to which products by a small matrix are done as one product of a tall one
_MASK = 0xFFFFFFFF


def hashed(numbers: Tensor) -> Tensor:
    """32 bits for each number of an int64 tensor, the same on every machine: the last step of MurmurHash3 (Appleby)."""
    numbers = numbers & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        numbers = ((numbers ^ (numbers >> shift)) * factor) & _MASK
    return numbers ^ (numbers >> 16)


@table(lambda size, seed, device, dtype: torch.empty(size, device=device, dtype=dtype))
def signs(size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(size,) random signs, ±1. Of one size and seed they are always the same; do not write to them."""
    draws = hashed(torch.arange(size) + hashed(torch.tensor(seed)) * 0x9E3779B1)
    return ((draws >> 7 & 1) * 2 - 1).to(device, dtype)


@cache
def _factors(size: int) -> tuple[tuple[int, ...], int]:
    """The powers of two, none above `_FACTOR`, and the odd number whose product is `size`."""
    odd, powers = size, []
    while odd % 2 == 0:
        step = 2
        while odd % (2 * step) == 0 and step < _FACTOR:
            step *= 2
        powers.append(step)
        odd //= step
    return tuple(powers), odd


@table(lambda size, device, dtype: torch.empty(size, size, device=device, dtype=dtype))
def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(size, size) symmetric and orthogonal; `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / size**0.5).to(device, dtype)


def odd_factor(size: int) -> int:
    """What is left of a size when it is halved as often as possible."""
    return size // (size & -size)


@table(lambda size, device, dtype: torch.empty(size, size, device=device, dtype=dtype))
def hartley(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(size, size) symmetric and orthogonal."""
    turns = torch.arange(size, dtype=torch.float64)
    angles = torch.outer(turns, turns).remainder(size) * (2 * torch.pi / size)
    return ((angles.cos() + angles.sin()) / size**0.5).to(device, dtype)


def transform(x: Tensor) -> Tensor:
    """`H x` along the last dimension, in the dtype of x (float32 or float64). H is symmetric and its own inverse."""
    size, at = x.shape[-1], (x.device, x.dtype)
    powers, odd = _factors(size)
    flat, after = x.reshape(-1, size), size
    for step in powers:  # each step mixes one digit of the index
        after //= step
        flat = _mixed(flat.reshape(-1, step, after), hadamard(step, *at)).reshape(-1, size)
    if odd > WIDEST:
        spectrum = torch.fft.fft(flat.reshape(-1, odd))
        flat = (spectrum.real - spectrum.imag) / odd**0.5
    elif odd > 1:
        flat = flat.reshape(-1, odd) @ hartley(odd, *at)
    return flat.reshape(x.shape)


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """A symmetric matrix (n, n) times x (count, n, after) along its middle dimension."""
    count, size, after = x.shape
    if after > _NARROW:
        return matrix @ x
    # many products with few columns each are slow: one with many rows in their place
    return (x.transpose(1, 2).reshape(-1, size) @ matrix).view(count, after, size).transpose(1, 2)


def rotate(x: Tensor, seed: int) -> Tensor:
    """`Q x` along the last dimension, in the dtype of x (float32 or float64)."""
    return transform(x * signs(x.shape[-1], seed, x.device, x.dtype))


def rotate_back(x: Tensor, seed: int) -> Tensor:
    """`Qᵀ x` along the last dimension: the inverse of `rotate`."""
    return transform(x) * signs(x.shape[-1], seed, x.device, x.dtype)


def rotate_both(weight: Tensor, seed: int) -> Tensor:
    """`Q_out W Q_inᵀ` of a weight (out, in): what multiplies a rotated input to give a rotated output.

    Args:
        seed: of the input's rotation; the output's has the next one.
    """
    return rotate(rotate(weight, seed).T, seed + 1).T


def rotate_both_back(weight: Tensor, seed: int) -> Tensor:
    """The inverse of `rotate_both`."""
    return rotate_back(rotate_back(weight.T, seed + 1).T, seed)
