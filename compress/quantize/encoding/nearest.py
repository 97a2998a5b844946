"""The nearest vector of a lattice code, and the nearest level of a scalar one.

E8P is searched through its structure: of the 256 patterns of magnitudes, each with the signs of the values, the one with the
highest inner product; where the signs break the parity, the sign that costs least is turned. 3 and 4 bits add a second stage,
which codes what the first has left.

Source: QuIP#, arXiv 2402.04396, §4 (E8P and residual codes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...forms.codes.code import LATTICE_STEPS, TILE, Code
from ...forms.codes.tables import lattice_patterns, lattice_vectors, scalar_levels, small_lattice_vectors
from ...forms.grids import pack

_AT_ONCE = 4096  # vectors that are compared with all patterns at a time


def encode_scalar(values: Tensor, code: Code) -> Tensor:
    """Packed tiles (tiles, code.nbytes) uint8 of the levels nearest to values (tiles, 256)."""
    levels = scalar_levels(code.bits, values.device)
    codes = torch.bucketize(values.float().contiguous(), (levels[1:] + levels[:-1]) / 2)
    return pack(codes.to(torch.uint8), code.bits)


def encode_lattice(values: Tensor, code: Code) -> Tensor:
    """Packed tiles (tiles, code.nbytes) uint8 of the vectors nearest to values (tiles, 256), stage by stage."""
    vectors = values.float().reshape(-1, 8)
    first, second = LATTICE_STEPS[code.bits]
    codes = nearest_in_lattice(vectors / first)
    stages = [codes & 255, codes >> 8]
    left = vectors - lattice_vectors(values.device)[codes] * first
    if code.bits == 3:
        small = small_lattice_vectors(values.device)
        stages.append((left @ small.T / second - small.square().sum(1) / 2).argmax(1))
    if code.bits == 4:
        more = nearest_in_lattice(left / second)
        stages += [more & 255, more >> 8]
    return torch.stack(stages, 1).to(torch.uint8).view(-1, TILE // 8 * code.bits)


def nearest_in_lattice(vectors: Tensor) -> Tensor:
    """Codes (n,) int64 of the vectors of E8P nearest to vectors (n, 8) float32."""
    parts = [_nearest(part) for part in vectors.split(_AT_ONCE)]
    return torch.cat(parts)


def _nearest(vectors: Tensor) -> Tensor:
    down, up = _shifted(vectors, -0.25), _shifted(vectors, 0.25)
    return torch.where(up[0] < down[0], up[1] | 1 << 15, down[1])


def _shifted(vectors: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Squared distances and codes (without the bit of the shift) of the nearest vectors with this shift."""
    patterns = lattice_patterns(vectors.device)
    inner = vectors - shift
    size, minus = inner.abs(), inner < 0
    odd = (minus.sum(1)[:, None] + patterns.sum(1).long()) & 1  # (n, patterns): whether one sign has to be turned
    turned = size[:, :1] * patterns[:, 0]
    for place in range(1, 8):
        turned = torch.minimum(turned, size[:, place, None] * patterns[:, place])
    cost = patterns.square().sum(1) - 2 * (size @ patterns.T) + 4 * odd * turned
    least, pattern = cost.min(1)
    chosen = patterns[pattern]
    turn = (size * chosen).argmin(1, keepdim=True)
    wrong = odd.gather(1, pattern[:, None]).bool()
    minus = minus.scatter(1, turn, minus.gather(1, turn) ^ wrong)
    signs = (minus[:, :7].long() << torch.arange(8, 15, device=vectors.device)).sum(1)
    return least + inner.square().sum(1), pattern | signs
