"""What dictionary methods share: their sizes, the problem in the metric of the data, best atoms and values, the solution.

Mathematics (CoSpaDi arXiv 2509.22075, COMPOT arXiv 2602.15200, in this form): in the metric of the input gram C only
P = W C Wᵀ matters. With P = M Mᵀ the loss of codes and atoms is ‖M - codes D‖², D the atoms in M's coordinates. For fixed codes
`atoms = codes⁺ W` is optimal whatever C is, so atoms go back to input channels without an inverse of the gram, and an exactly
singular gram is as good as any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..base import Settings, Solution, TargetStats
from ..forms.dictionary import Dictionary, Pattern, nbytes
from ..options import Choice, Option, Shape

MOST_OFFERS = 256
_RANGE = 1e-12  # eigenvalues below this part of the largest are dependence among codes, not information
_CLEAR = 1e-2  # of a unit code's length, what the codes before it cannot make: above it few of the digits are at stake
_SPLITS = (1.5, 2.0, 2.5, 3.0)  # atoms per nonzero that 'auto' tries
_SAME = 0.01  # splits whose atoms differ by less are one


class DictionarySettings(Settings):
    """Settings of every dictionary method."""

    pattern: Pattern = Field("free", description="where codes may be: anywhere, or two in each group of four atoms")
    atoms_per_nonzero: Literal["auto"] | float = Field(
        2.0, description="atoms per code of a row (at least 1); 'auto' tries a few at equal bytes and takes the best per target"
    )
    refits: int = Field(10, ge=0, le=1000, description="final rounds of least squares for values and atoms, support fixed")

    @model_validator(mode="after")
    def _sizes_fit(self) -> DictionarySettings:
        if self.atoms_per_nonzero != "auto" and not 1 <= self.atoms_per_nonzero <= 64:
            raise ValueError(f"atoms_per_nonzero must lie between 1 and 64, or be 'auto'; not {self.atoms_per_nonzero:g}")
        if self.pattern == "2:4" and self.atoms_per_nonzero != 2:
            raise ValueError("pattern 2:4 keeps every second atom: atoms_per_nonzero must be 2")
        return self


def most_atoms(out_features: int, in_features: int) -> int:
    """The largest orthogonal dictionary: more atoms than the weight's rank can be say nothing new."""
    return min(out_features, in_features)


def dictionary_options(
    shape: Shape, settings: DictionarySettings, multiple: int = 1, most: Callable[[int, int], int] = most_atoms
) -> list[Option]:
    """Atoms from few to `most`, with their share of nonzeros; past that the surplus goes to nonzeros. At most 256 offers."""
    ratio = 2.0 if settings.atoms_per_nonzero == "auto" else settings.atoms_per_nonzero
    step = math.lcm(multiple, 4) if settings.pattern == "2:4" else multiple
    largest = most(shape.out_features, shape.in_features) // step * step
    useful = min(largest, shape.in_features)  # a row needs no more atoms than channels
    pairs = [(k, min(int(k / ratio + 1e-9), useful)) for k in range(step, largest + 1, step)]
    if settings.pattern == "free":
        pairs += [(largest, s) for s in range(int(largest / ratio) + 1, useful + 1)]
    options = [Option(Choice(atoms=k, nonzeros=s), nbytes(shape, k, s * shape.out_features)) for k, s in pairs if s > 0]
    options = [option for option in options if option.nbytes < shape.nbytes]
    if len(options) <= MOST_OFFERS:
        return options
    return [options[round(i * (len(options) - 1) / (MOST_OFFERS - 1))] for i in range(MOST_OFFERS)]


@dataclass(frozen=True)
class Problem:
    """A target in coordinates in which its loss is a plain squared distance.

    Args:
        points: (out, r) float64, one row per output, r = min(out, in): P = points pointsᵀ, columns orthogonal and descending.
            Directions that calibration never saw come last, below the smallest that it saw, in the order of the plain norm
            of the weight in them.
        seen: how many leading columns calibration saw; the loss is told from these.
    """

    points: Tensor
    seen: int

    @staticmethod
    def of(weight: Tensor, stats: TargetStats) -> Problem:
        """From a weight (out, in) and either its output gram or its group's gram."""
        directions = stats.directions(weight)
        values, rank = directions.values, min(weight.shape)
        basis = directions.basis(rank)
        largest = values[0] if len(values) else values.new_zeros(())
        floor = largest * len(values) * torch.finfo(torch.float64).eps
        seen = int((values > floor).sum())
        plain = (basis[:, seen:].T @ weight.double()).square().sum(1)
        unseen = plain / plain.max().clamp_min(1e-300) * (floor if seen else 1.0) if len(plain) else plain
        return Problem(basis * torch.cat([values[:seen], unseen]).sqrt(), seen)

    @property
    def total(self) -> float:
        return float(self.points[:, : self.seen].square().sum())

    def loss(self, codes: Tensor, atoms: Tensor) -> float:
        """For (out, k) codes and (k, r) atoms."""
        return float((self.points - codes @ atoms)[:, : self.seen].square().sum())


def best_atoms(codes: Tensor, weight: Tensor) -> Tensor:
    """`codes⁺ weight`, (k, n): the atoms that lose least, in any metric of the columns (method of optimal directions).

    Args:
        codes: (out, k) float64.
        weight: (out, n).
    """
    lengths = codes.norm(dim=0)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    unit, weight = codes / lengths, weight.double()
    gram = unit.T @ unit
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed and factor.diagonal().min() > _CLEAR:  # the usual case, and many times as fast
        return torch.cholesky_solve(unit.T @ weight, factor) / lengths[:, None]
    values, vectors = torch.linalg.eigh(gram)
    held = values > _RANGE * values[-1]
    kept, inner = vectors[:, held], values[held, None]
    atoms = kept @ ((kept.T @ (unit.T @ weight)) / inner)
    # normal equations square the condition number; one step of refinement wins the digits back
    atoms += kept @ ((kept.T @ (unit.T @ (weight - unit @ atoms))) / inner)
    return atoms / lengths[:, None]


def best_values(points: Tensor, codes: Tensor, mask: Tensor, atoms: Tensor, steps: int = 2) -> Tensor:
    """Codes (out, k) under the mask moved towards least squares for fixed atoms, by conjugate gradients in all rows at once.

    The loss falls with every step; in turn with new atoms two steps end where eight do. Unit atoms are all the conditioning
    that near-orthogonal ones need.
    """
    lengths = atoms.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    unit = atoms / lengths[:, None]
    gram, codes = unit @ unit.T, codes * lengths
    residual = (points @ unit.T - codes @ gram) * mask
    direction, energy = residual, residual.square().sum(1)
    for _ in range(steps):
        turned = (direction @ gram) * mask
        curvature = (direction * turned).sum(1)
        length = torch.where(curvature > 0, energy / curvature.clamp_min(1e-300), torch.zeros_like(energy))[:, None]
        codes = codes + length * direction
        residual = residual - length * turned
        before, energy = energy, residual.square().sum(1)
        turn = torch.where(before > 0, energy / before.clamp_min(1e-300), torch.zeros_like(energy))[:, None]
        direction = residual + turn * direction
    return codes / lengths


@dataclass(frozen=True)
class Coded:
    """Codes (out, k) float64, zero outside the mask, and what they lose with the best atoms."""

    codes: Tensor
    mask: Tensor
    loss: float


def refined(problem: Problem, codes: Tensor, mask: Tensor, rounds: int) -> Coded:
    """Values and atoms refitted in turn with the support fixed; the loss never rises."""
    atoms = best_atoms(codes, problem.points)
    for _ in range(rounds):
        codes = best_values(problem.points, codes, mask, atoms)
        atoms = best_atoms(codes, problem.points)
    return Coded(codes, mask, problem.loss(codes, atoms))


Split = tuple[int, int]
"""(atoms, nonzeros of the whole target)"""
Learn = Callable[[Problem, Sequence[Split]], Coded]
"""Codes for a problem, in whichever of the splits loses least; they all take the same bytes."""


@dataclass(frozen=True)
class DictionarySolution(Solution):
    """A target whose dictionary is learned for the size that is asked for.

    Args:
        weight: (out, in).
        learn: the method's own.
        most: the largest number of atoms.
    """

    weight: Tensor
    problem: Problem
    settings: DictionarySettings
    learn: Learn
    most: int
    _last: dict[Choice, Coded] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.problem.total

    def loss(self, choice: Choice) -> float:
        return self.coded(choice).loss

    def form(self, choice: Choice) -> Dictionary:
        coded = self.coded(choice)
        atoms = best_atoms(coded.codes, self.weight)
        # the scale of each atom shared evenly with its codes, which suits 16-bit storage
        a, b = coded.codes.norm(dim=0), atoms.norm(dim=1)
        scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
        return Dictionary.of(coded.codes * scale, coded.mask, atoms / scale[:, None], self.settings.pattern)

    def coded(self, choice: Choice) -> Coded:
        """The codes that were learned for a choice."""
        if choice.atoms is None or choice.nonzeros is None:
            raise ValueError("a dense target is not solved")
        if choice not in self._last:
            splits = [(choice.atoms, choice.nonzeros * len(self.weight))]
            if self.settings.atoms_per_nonzero == "auto":
                splits += self._splits(*splits[0])
            while len(self._last) > 1:  # codes of two sizes are held (a probe asks for both again), not of every size
                del self._last[next(iter(self._last))]
            self._last[choice] = self.learn(self.problem, splits)
        return self._last[choice]

    def _splits(self, atoms: int, nonzeros: int) -> list[Split]:
        """Others of exactly the same bytes, and of clearly more or fewer atoms."""
        shape = Shape(self.weight.shape[0], self.weight.shape[1], self.weight.element_size())
        whole, rows = nbytes(shape, atoms, nonzeros), shape.out_features
        found: dict[int, int] = {}
        for ratio in _SPLITS:
            bits = rows / 8 / shape.element
            k = min(self.most, round(whole / shape.element / (shape.in_features + rows / ratio + bits)))
            n = (whole - nbytes(shape, k, 0)) // shape.element
            if k > 0 and rows <= n <= rows * min(k, shape.in_features) and abs(k - atoms) > _SAME * atoms:
                found[k] = n
        return list(found.items())
