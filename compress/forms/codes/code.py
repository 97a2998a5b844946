"""A code: how 256 values, a tile of 16 x 16, are held in 32 bytes per bit, and how they are read back.

Tiles are read row by row. A trellis' tile is one sequence whose end meets its start (tail-biting), so that it costs no bit more
than its values: the state at a value is a window of `state_bits` bits on the ring of the tile's bits. The ring is held in words
of 16 bits, first the first word of each row, then the second ones: kernels read the 16 rows of a tile at once. A lattice' tile
is 32 vectors of eight neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..grids import pack, unpack
from .tables import lattice_vectors, scalar_levels, small_lattice_vectors, trellis_values

Kind = Literal["trellis", "e8", "scalar"]
SIDE = 16  # rows and columns of a tile
TILE = SIDE * SIDE
BITS: dict[str, tuple[int, ...]] = {"trellis": (1, 2, 3, 4, 5, 6), "e8": (2, 3, 4), "scalar": (2, 3, 4, 5)}
STATE_BITS = range(6, 17)
VERSION = 2  # of how a trellis' tile is held and what its values are; 1 had another table

# (size of the first stage's lattice, size of the second's) for values of variance 1, at the least squared error on a Gaussian;
# benchmarks/quality/codes.py searches them (`--fit`)
LATTICE_STEPS: dict[int, tuple[float, float]] = {2: (0.97, 0.0), 3: (1.03, 0.5), 4: (1.15, 0.3)}


@dataclass(frozen=True)
class Code:
    """A code for values that look like draws from a Gaussian of variance 1.

    Args:
        kind: trellis, e8 or scalar.
        bits: per value.
        state_bits: of a trellis, which has 2^state_bits states; 0 for the other kinds.
        version: of what its bytes mean.
    """

    kind: Kind
    bits: int
    state_bits: int = 0
    version: int = VERSION

    @classmethod
    def of(cls, kind: Kind, bits: int, state_bits: int) -> Code:
        """The code of a recipe's settings; only a trellis has states."""
        return cls(kind, bits, state_bits if kind == "trellis" else 0)

    def __post_init__(self) -> None:
        if self.bits not in BITS[self.kind]:
            raise ValueError(f"a code of kind {self.kind} has {', '.join(map(str, BITS[self.kind]))} bits, not {self.bits}")
        if self.kind == "trellis" and self.version != VERSION:
            raise ValueError(
                f"a trellis of version {self.version}, and this lrc reads version {VERSION}: compress the model again, or open "
                "the result with the lrc that wrote it"
            )
        if (self.kind == "trellis") != (self.state_bits in STATE_BITS):
            raise ValueError(
                f"a trellis has {STATE_BITS[0]} to {STATE_BITS[-1]} state bits, other codes 0; not {self.state_bits}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of a tile."""
        return TILE * self.bits // 8

    def values(self, packed: Tensor) -> Tensor:
        """The values (tiles, 256) float32 of packed tiles (tiles, nbytes) uint8."""
        if self.kind == "trellis":
            table = trellis_values(self.state_bits, packed.device)
            return table.index_select(0, self.states(packed).flatten()).view(-1, TILE)
        if self.kind == "scalar":
            codes = unpack(packed, self.bits, TILE)
            return scalar_levels(self.bits, packed.device).index_select(0, codes.flatten().int()).view(-1, TILE)
        first, second = LATTICE_STEPS[self.bits]
        parts = packed.view(len(packed), TILE // 8, self.bits).int()
        found = lattice_vectors(packed.device)[parts[..., 0] | parts[..., 1] << 8] * first
        if self.bits == 3:
            found = found + small_lattice_vectors(packed.device)[parts[..., 2]] * second
        if self.bits == 4:
            found = found + lattice_vectors(packed.device)[parts[..., 2] | parts[..., 3] << 8] * second
        return found.flatten(1)

    def states(self, packed: Tensor) -> Tensor:
        """The states (tiles, 256) int32 of a trellis, each a window of the ring of bits; the newest bits are the lowest."""
        # the ring begins with the last row
        ring = packed.view(len(packed), self.bits, SIDE, 2).transpose(1, 2).flip(1).reshape(len(packed), -1).int()
        words = ring | ring.roll(-1, 1) << 8 | ring.roll(-2, 1) << 16
        # eight values fill `bits` whole bytes; the last value of a tile has the lowest bits
        eights = words.view(len(packed), TILE // 8, self.bits).flip(1)
        places = [(place * self.bits // 8, place * self.bits % 8) for place in range(7, -1, -1)]
        windows = torch.stack([eights[..., byte] >> shift for byte, shift in places], -1)
        return windows.bitwise_and_((1 << self.state_bits) - 1).view(-1, TILE)

    def pack_symbols(self, symbols: Tensor) -> Tensor:
        """Symbols (tiles, 256) uint8 of a trellis, below 2^bits, in the order of the sequence, as bytes (tiles, nbytes)."""
        ring = pack(symbols.flip(1), self.bits)  # older bits stand higher, as in a state
        return ring.view(len(ring), SIDE, self.bits, 2).flip(1).transpose(1, 2).reshape(len(ring), -1)

    def spec(self) -> dict[str, Any]:
        """What a loader must know, as JSON: the arguments of this class."""
        return {"kind": self.kind, "bits": self.bits, "state_bits": self.state_bits, "version": self.version}


def to_tiles(matrix: Tensor) -> Tensor:
    """A matrix (out, in), filled up with zeros to whole tiles, as (rows of tiles, columns of tiles, 256)."""
    rows, columns = -(-matrix.shape[0] // SIDE), -(-matrix.shape[1] // SIDE)
    whole = torch.nn.functional.pad(matrix, (0, columns * SIDE - matrix.shape[1], 0, rows * SIDE - matrix.shape[0]))
    return whole.view(rows, SIDE, columns, SIDE).transpose(1, 2).reshape(rows, columns, TILE)


def from_tiles(tiles: Tensor) -> Tensor:
    """The inverse of `to_tiles`, with what was filled up: (rows of tiles, columns of tiles, 256) as a matrix."""
    rows, columns, _ = tiles.shape
    return tiles.view(rows, columns, SIDE, SIDE).transpose(1, 2).reshape(rows * SIDE, columns * SIDE)
