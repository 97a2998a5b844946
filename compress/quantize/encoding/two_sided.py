"""Error feedback along rows and columns: each tile compensates for the errors of the tiles above it and to its left.

With the gram of the inputs C = R Rᵀ and that of the output gradients G = S Sᵀ, both factors upper triangular, an error E costs
tr(G E C Eᵀ) = ‖Sᵀ E R‖². The part of that product that belongs to a tile of 16 x 16 contains the errors of all tiles above it
and to its left. With each factor's blocks divided by their own diagonal block (N from R, M from S) the values that cancel them
are W + A + U: A = E N over the columns before the tile, as in feedback.py, and U = Mᵀ (E + A) over the rows above it.

Tiles on one antidiagonal do not depend on each other and are encoded together. Scales must then be there before the errors
are: the expected mean square of a column's values follows from that of the columns before it, because the errors of a code are
as good as independent.

Source: YAQA, Tseng et al., arXiv 2505.22988, §3 (adaptive rounding with a Kronecker-factored Hessian). Differences from the
authors' code: the order by antidiagonals, and one scale for 16 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...forms.codes.code import SIDE, Code
from .feedback import ENCODERS

# Mean squared error of each kind of code as a multiple of the bound 4^-bits, about; for the expected size of the feedback.
_LOST = {"trellis": 1.3, "e8": 1.8, "scalar": 2.2}
_LEAST_SHARE = 0.25  # of a column's own energy where the feedback from the rows above it would grow without a bound


def encode_two_sided(weight: Tensor, inputs: Tensor | None, outputs: Tensor | None, code: Code) -> tuple[Tensor, Tensor]:
    """Codes (rows of tiles, columns of tiles, bytes of a tile) uint8 and scales (columns of tiles,) float64 of a weight.

    Args:
        weight: (out, in) float64; as a code wants it, rotated on both sides.
        inputs: (in, in) float64 upper triangular R with R Rᵀ = the damped gram of its inputs; None: the identity.
        outputs: (out, out) float64 upper triangular S with S Sᵀ = the shrunk gram of the gradients of its outputs; None: the
            identity.

    Scales have eight significant bits, which every dtype of a checkpoint represents exactly.
    """
    own, above, left = _tiles(weight), _normalised(outputs, weight, 0), _normalised(inputs, weight, 1)
    rows, columns = own.shape[0], own.shape[2]
    scales = _scales(_energies(weight), above, left, code)
    # On an antidiagonal rows ascend and columns descend: with columns of tiles stored backwards both are slices, not copies.
    before = left.view(-1, columns, SIDE).transpose(0, 1).flip(0)  # (columns of tiles, in, 16)
    over = above.view(-1, rows, SIDE).permute(1, 2, 0).contiguous()  # (rows of tiles, 16, out)
    errors = torch.zeros_like(own)  # E; zero where no code is yet, as E + A
    passed = weight.new_zeros(columns, rows, SIDE, SIDE)
    codes = torch.empty(rows, columns, code.nbytes, dtype=torch.uint8, device=weight.device)
    for diagonal in range(rows + columns - 1):
        first, last = max(0, diagonal - columns + 1), min(rows, diagonal + 1)
        row = torch.arange(first, last, device=weight.device)
        column = diagonal - row
        backwards = slice(columns - 1 - diagonal + first, columns - 1 - diagonal + last)
        values, scale = own[row, :, column], scales[column][:, None, None]
        width, height = (diagonal - first) * SIDE, (last - 1) * SIDE  # beyond them nothing on this antidiagonal has errors
        from_left = errors[first:last].flatten(2)[..., :width] @ before[backwards, :width]
        from_above = over[first:last, :, :height] @ passed[backwards].flatten(1, 2)[:, :height]
        wanted = values + from_left + from_above
        packed = ENCODERS[code.kind]((wanted / torch.where(scale > 0, scale, 1)).flatten(1), code)
        codes[row, column] = packed
        error = values - code.values(packed).double().view(wanted.shape) * scale
        errors[row, :, column] = error
        passed[columns - 1 - column, row] = error + from_left
    return codes, scales


def _tiles(weight: Tensor) -> Tensor:
    """A weight, filled up with zeros to whole tiles, as (rows of tiles, 16, columns of tiles, 16)."""
    whole = pad(weight, (0, -weight.shape[1] % SIDE, 0, -weight.shape[0] % SIDE))
    return whole.view(len(whole) // SIDE, SIDE, -1, SIDE)


def _normalised(factor: Tensor | None, weight: Tensor, side: int) -> Tensor:
    """The factor of a side of the weight, filled up to whole tiles, its blocks of columns divided by their own block."""
    if factor is None:
        factor = torch.eye(weight.shape[side], dtype=weight.dtype, device=weight.device)
    missing = -len(factor) % SIDE
    whole = pad(factor, (0, missing, 0, missing))
    whole.diagonal()[len(factor) :] = 1
    blocks = whole.split(SIDE, 1)
    own = [block[at * SIDE : (at + 1) * SIDE] for at, block in enumerate(blocks)]
    return torch.cat([torch.linalg.solve_triangular(o, b, upper=True, left=False) for o, b in zip(own, blocks, strict=True)], 1)


def _energies(weight: Tensor) -> Tensor:
    """The mean square of each column of tiles, without what fills it up."""
    return torch.stack([part.square().mean() for part in weight.split(SIDE, 1)])


def _scales(energy: Tensor, above: Tensor, left: Tensor, code: Code) -> Tensor:
    """The expected root mean square of the values to encode, by column of tiles.

    All errors together are M⁻ᵀ e N⁻¹ with e those of the code alone, so what is added to a tile is the part of this that comes
    from other tiles.
    """
    lost = _LOST[code.kind] / 4**code.bits
    across, down = _shares(left), float(_shares(above).sum(0).mean())
    found = torch.zeros_like(energy)
    for column in range(len(energy)):
        carried = lost * down * (found[:column] * across[:column, column]).sum()
        found[column] = (energy[column] + carried) / max(_LEAST_SHARE, 1 - lost * (down - 1))
    return found.sqrt().to(torch.bfloat16).double()


def _shares(normalised: Tensor) -> Tensor:
    """(n, n) of n blocks: the mean square by which the error of the code in one block reaches the values of another one."""
    eye = torch.eye(len(normalised), dtype=normalised.dtype, device=normalised.device)
    inverse = torch.linalg.solve_triangular(normalised, eye, upper=True)
    blocks = len(normalised) // SIDE
    return inverse.view(blocks, SIDE, blocks, SIDE).square().sum((1, 3)) / SIDE
