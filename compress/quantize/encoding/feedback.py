"""Block LDLQ: columns are encoded 16 at a time; each block compensates for the errors of the blocks before it.

With the gram factored as C = R Rᵀ, R upper triangular, the output error is ‖(W - Ŵ) R‖². The columns of a block contain the
errors E of all earlier blocks; the values that cancel them are W + E R_before R_own⁻¹, with R_own the block's own triangle.
The code takes the values nearest to these, with one scale for the block: their root mean square.

Source: LDLQ in QuIP, arXiv 2307.13304, §3, by blocks in QuIP#, arXiv 2402.04396, §4.1, algorithm 2 and QTIP, arXiv 2406.11235,
§3. Differences from the authors' code: one scale for 16 columns instead of one for the matrix, because later blocks hold more:
errors are passed on to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...forms.codes.code import SIDE, Code, from_tiles, to_tiles
from .nearest import encode_lattice, encode_scalar
from .viterbi import encode_trellis

ENCODERS = {"trellis": encode_trellis, "e8": encode_lattice, "scalar": encode_scalar}


def encode_columns(weight: Tensor, factor: Tensor | None, code: Code) -> tuple[Tensor, Tensor]:
    """Codes (rows of tiles, columns of tiles, bytes of a tile) uint8 and scales (columns of tiles,) float64 of a weight.

    Args:
        weight: (out, in) float64; as a code wants it, rotated on both sides.
        factor: (in, in) float64 upper triangular R with R Rᵀ = the damped gram of its inputs; None: no feedback.

    Scales have eight significant bits, which every dtype of a checkpoint represents exactly.
    """
    errors = torch.empty_like(weight)
    codes, scales = [], []
    for start in range(0, weight.shape[1], SIDE):
        own = slice(start, min(start + SIDE, weight.shape[1]))
        wanted = weight[:, own]
        if factor is not None and start:
            carried = errors[:, :start] @ factor[:start, own]
            wanted = wanted + torch.linalg.solve_triangular(factor[own, own], carried, upper=True, left=False)
        scale = wanted.square().mean().sqrt().to(torch.bfloat16).double()
        tiles = to_tiles(wanted / scale if scale > 0 else wanted)
        packed = ENCODERS[code.kind](tiles.flatten(0, 1), code)
        found = from_tiles(code.values(packed).double().view(tiles.shape)) * scale
        errors[:, own] = weight[:, own] - found[: len(weight), : wanted.shape[1]]
        codes.append(packed)
        scales.append(scale)
    return torch.stack(codes, 1), torch.stack(scales)
