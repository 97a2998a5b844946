"""The values of codes, computed from formulas: nothing is stored and nothing was fitted to a model.

* trellis: 2^L states, each with a value: a multiplication mixes the state's bits, and the sum of the product's four bytes is
  near to a Gaussian. A kernel computes sixteen of them in a dozen instructions, where a table has to be read one by one.
* E8: 2^16 vectors of the E8 lattice shifted by a quarter (E8P), a vector of eight values from 256 patterns of magnitudes, seven
  signs, and the sign of the shift; and the 241 shortest vectors of E8 with 15 longer ones, one byte, which code what is left.
* scalar: the levels of Lloyd and Max for a Gaussian.

Source: QTIP, arXiv 2406.11235, §3 (bitshift trellis; the sum of four bytes is its 1MAD, here without an addend and with another
factor: of 40,000 at random it has the least distortion, with 2^10 to 2^14 states and 1 to 6 bits); QuIP#, arXiv 2402.04396, §4
and appendix C (E8P; its 29 patterns beyond the ball of radius √10 are a list of the authors, here they are the first ones of
norm √12 in lexicographic order); Max 1960, Lloyd 1982.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, product

import torch
from torch import Tensor

from .constants import table

FACTOR = 1133000287  # of a state, modulo 2^32
CENTRE = 510  # the mean of a sum of four bytes


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)
def _sums_of_bytes(state_bits: int) -> Tensor:
    """(2^state_bits,) int64, of each state's product with the factor, less their mean."""
    products = torch.arange(1 << state_bits) * FACTOR & 0xFFFFFFFF
    return sum(products >> shift & 255 for shift in (0, 8, 16, 24)) - torch.tensor(CENTRE)


@torch.compiler.assume_constant_result
def trellis_unit(state_bits: int) -> float:
    """What a sum of bytes is multiplied by, so that the values of all states have variance 1; a number of float32."""
    return _unit(state_bits)


@lru_cache(maxsize=16)
def _unit(state_bits: int) -> float:
    return float((1 / _sums_of_bytes(state_bits).double().square().mean().sqrt()).float())


@table(lambda state_bits, device: torch.empty(1 << state_bits, device=device))
def trellis_values(state_bits: int, device: torch.device) -> Tensor:
    """(2^state_bits,) float32, the value of each state; variance 1, and a mean within a hundredth of 0."""
    return (_sums_of_bytes(state_bits).float() * trellis_unit(state_bits)).to(device)


def _patterns() -> list[tuple[float, ...]]:
    """256 vectors of magnitudes ½, 3/2, 5/2: all with a norm of at most √10, and the first ones of norm √12."""
    found = [p for p in product((0.5, 1.5, 2.5), repeat=8) if sum(each * each for each in p) <= 10]
    more = [p for p in product((0.5, 1.5), repeat=8) if sum(each * each for each in p) == 12]
    return sorted(found) + sorted(more)[: 256 - len(found)]


@table(lambda device: torch.empty(256, 8, device=device))
def lattice_patterns(device: torch.device) -> Tensor:
    """(256, 8) float32, the magnitudes of the vectors of E8P before their shift."""
    return torch.tensor(_patterns(), dtype=torch.float32, device=device)


@table(lambda device: torch.empty(1 << 16, 8, device=device))
def lattice_vectors(device: torch.device) -> Tensor:
    """(65536, 8) float32, the vectors of E8P: code = pattern + 2^8 · (signs of the first seven entries) + 2^15 · (shift up).

    The sign of the last entry follows: the entries before the shift have an even sum.
    """
    codes = torch.arange(1 << 16)
    magnitudes = torch.tensor(_patterns(), dtype=torch.float64)[codes & 255]
    minus = codes[:, None] >> torch.arange(8, 15) & 1
    parity = (magnitudes.sum(1).long() + minus.sum(1)) & 1  # a flipped sign changes the sum by an odd number
    minus = torch.cat([minus, parity[:, None]], 1)
    shift = torch.where(codes[:, None] >> 15 == 1, 0.25, -0.25)
    return (magnitudes * (1 - 2 * minus) + shift).float().to(device)


@table(lambda device: torch.empty(256, 8, device=device))
def small_lattice_vectors(device: torch.device) -> Tensor:
    """(256, 8) float32: 0, the 240 shortest vectors of E8 (norm √2), and 15 of the 16 that are ± 2 in one entry."""
    vectors = [[0.0] * 8]
    for first, second in combinations(range(8), 2):
        for one, two in product((1.0, -1.0), repeat=2):
            vectors.append([one if i == first else two if i == second else 0.0 for i in range(8)])
    vectors += [list(each) for each in product((0.5, -0.5), repeat=8) if sum(each) % 2 == 0]
    vectors += [[sign if i == place else 0.0 for i in range(8)] for place in range(8) for sign in (2.0, -2.0)][:15]
    return torch.tensor(vectors, dtype=torch.float32, device=device)


@table(lambda bits, device: torch.empty(1 << bits, device=device))
def scalar_levels(bits: int, device: torch.device) -> Tensor:
    """(2^bits,) float32 ascending, the levels with the least squared error for a Gaussian of variance 1.

    Lloyd's iteration on the distribution itself, in float64: each level is the mean of what is nearer to it than to the others.
    """
    count = 1 << bits
    levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinite = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(20_000):
        edges = torch.cat([-infinite, (levels[1:] + levels[:-1]) / 2, infinite])
        density = torch.exp(-edges.square() / 2) / (2 * torch.pi) ** 0.5
        share = torch.special.ndtr(edges).diff()
        moved = (density[:-1] - density[1:]) / share
        done = bool((moved - levels).abs().max() < 1e-9)
        levels = moved
        if done:
            break
    return levels.float().to(device)
