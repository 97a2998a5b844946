"""The sequence of a bitshift trellis nearest to given values, by Viterbi's algorithm; many tiles at once.

A state is the last `state_bits` bits; each value adds `bits` new ones at the low end. All 2^bits states before a state share
their low bits, so one minimum serves 2^bits states after it. The least costs of every step are kept, 2^(state_bits - bits)
numbers a tile, and the way back is found from them.

The ring is closed in two passes: the best free sequence of the values around the seam says which bits meet there, and the best
sequence with these bits is the result. Only some values on both sides of the seam matter for that.

Cost: some 6 · 2^state_bits operations on float32 for each value. Memory: `_MOST_BYTES` for the costs of the tiles in work.

On the CPU numba's compiled search is taken where it is installed (compiled.py); this one needs torch alone, and runs on any
device.

Source: QTIP, arXiv 2406.11235, §3.1 and algorithm 4 (tail-biting by a rotated first pass over the whole sequence).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...forms.codes.code import TILE, Code
from ...forms.codes.tables import trellis_values
from .compiled import available, viterbi_compiled

_MOST_BYTES = 48 << 20  # of kept costs: tiles are worked on in parts that need no more
_MEMORIES = 4  # values on each side of the seam, in lengths of the trellis' memory
_FORBIDDEN = 1e9


def encode_trellis(values: Tensor, code: Code) -> Tensor:
    """Packed tiles (tiles, code.nbytes) uint8 of the sequences nearest to values (tiles, 256) of variance 1; in float32."""
    entering = code.state_bits - code.bits
    each = TILE * 4 * (1 << entering)
    parts = [_encode(part.T.float(), code) for part in values.split(max(1, _MOST_BYTES // each))]
    return code.pack_symbols(torch.cat(parts, 1).T.contiguous())


def _encode(values: Tensor, code: Code) -> Tensor:
    """Symbols (256, tiles) uint8 of values (256, tiles)."""
    half = min(TILE // 2, _MEMORIES * -(-code.state_bits // code.bits))
    around = torch.cat([values[-half:], values[:half]])
    search = viterbi_compiled if available(code, values.device) else viterbi
    shared = search(around, code)[half] >> code.bits
    states = search(values, code, shared)
    return (states & ((1 << code.bits) - 1)).to(torch.uint8)


def viterbi(values: Tensor, code: Code, ring: Tensor | None = None) -> Tensor:
    """The states (steps, tiles) int64 whose values are nearest to the given ones (steps, tiles) float32.

    Args:
        ring: (tiles,) the low state_bits - bits bits of the last state, which are also those of the state before the first;
            None: any.
    """
    table = trellis_values(code.state_bits, values.device)[:, None]
    branches, low, tiles = 1 << code.bits, 1 << (code.state_bits - code.bits), values.shape[1]
    # the least costs before each step, by the bits that the next state keeps
    least = values.new_empty(len(values) + 1, low, tiles)
    least[0].zero_()
    if ring is not None:
        least[0].fill_(_FORBIDDEN).scatter_(0, ring[None], 0.0)
    cost = values.new_empty(len(table), tiles)
    by_kept, by_oldest = cost.view(low, branches, tiles), cost.view(branches, low, tiles)
    # The lowest bits of a cost say which of the oldest bits it belongs to, so that its minimum says where it came from. Costs
    # are positive, so their order is that of their bits; the bits that are lost are far below the differences that matter.
    words, mark = cost.view(torch.int32), torch.arange(branches, dtype=torch.int32, device=values.device)[:, None, None]
    for step in range(len(values)):
        torch.sub(values[step], table, out=cost)
        torch.mul(cost, cost, out=cost)
        by_kept.add_(least[step][:, None])
        words.bitwise_and_(-branches)
        words.view(by_oldest.shape).bitwise_or_(mark)
        torch.amin(by_oldest, 0, out=least[step + 1])
    kept = least[-1].argmin(0) if ring is None else ring
    return _way_back(kept, least.view(torch.int32), code)


def _way_back(kept: Tensor, least: Tensor, code: Code) -> Tensor:
    """The states (steps, tiles) of the cheapest sequence whose last state has the low bits `kept` (tiles,)."""
    low, branches = 1 << (code.state_bits - code.bits), 1 << code.bits
    states = torch.empty(len(least) - 1, len(kept), dtype=torch.int64, device=kept.device)
    for step in range(len(states) - 1, -1, -1):
        oldest = least[step + 1].gather(0, kept[None])[0] & (branches - 1)
        torch.add(kept, oldest, alpha=low, out=states[step])
        kept = states[step] >> code.bits
    return states
