"""Common code of the dictionary methods: options, the problem in the metric of the data, best atoms and values, the solution.

Mathematics (CoSpaDi arXiv 2509.22075, COMPOT arXiv 2602.15200, in this form): in the metric of the input gram C only
P = W C Wᵀ matters. With P = M Mᵀ the loss of codes and atoms is ‖M - codes D‖², where D are the atoms in M's coordinates. For
fixed codes `atoms = codes⁺ W` is optimal for every C. The atoms are therefore mapped back to input channels without an inverse
of the gram, and an exactly singular gram is no special case.
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

MOST_OPTIONS = 256
_RANGE = 1e-12  # eigenvalues below this fraction of the largest come from linearly dependent codes and carry no information
_CLEAR = 1e-2  # pivots (of unit codes) above this lose few digits
_SPLITS = (1.5, 2.0, 2.5, 3.0)  # atoms per nonzero that 'auto' tries
_SAME = 0.01  # splits whose numbers of atoms differ by less than this fraction count as one


class DictionarySettings(Settings):
    """Settings of every dictionary method."""

    pattern: Pattern = Field("free", description="where nonzero codes may be: anywhere, or two in each group of four atoms")
    atoms_per_nonzero: Literal["auto"] | float = Field(
        2.0,
        description="atoms per nonzero code of a row (at least 1); 'auto' tries a few at equal bytes, keeps each target's best",
    )
    refits: int = Field(10, ge=0, le=1000, description="final rounds of least squares for values and atoms, with fixed support")

    @model_validator(mode="after")
    def _sizes_fit(self) -> DictionarySettings:
        if self.atoms_per_nonzero != "auto" and not 1 <= self.atoms_per_nonzero <= 64:
            raise ValueError(f"atoms_per_nonzero must lie between 1 and 64, or be 'auto'; not {self.atoms_per_nonzero:g}")
        if self.pattern == "2:4" and self.atoms_per_nonzero != 2:
            raise ValueError("pattern 2:4 keeps every second atom: atoms_per_nonzero must be 2")
        return self


def most_atoms(out_features: int, in_features: int) -> int:
    """Atoms of the largest orthogonal dictionary: more than the weight's rank add nothing."""
    return min(out_features, in_features)


def dictionary_options(
    shape: Shape, settings: DictionarySettings, multiple: int = 1, most: Callable[[int, int], int] = most_atoms
) -> list[Option]:
    """Up to `most` atoms with the nonzeros that belong to them; beyond that only the nonzeros grow. At most 256 options.

    Args:
        most: (out, in) -> the largest number of atoms.
    """
    ratio = 2.0 if settings.atoms_per_nonzero == "auto" else settings.atoms_per_nonzero
    step = math.lcm(multiple, 4) if settings.pattern == "2:4" else multiple
    largest = most(shape.out_features, shape.in_features) // step * step
    useful = min(largest, shape.in_features)  # a row needs no more atoms than channels
    pairs = [(k, min(int(k / ratio + 1e-9), useful)) for k in range(step, largest + 1, step)]
    if settings.pattern == "free":
        pairs += [(largest, s) for s in range(int(largest / ratio) + 1, useful + 1)]
    options = [Option(Choice(atoms=k, nonzeros=s), nbytes(shape, k, s * shape.out_features)) for k, s in pairs if s > 0]
    options = [option for option in options if option.nbytes < shape.nbytes]
    if len(options) <= MOST_OPTIONS:
        return options
    return [options[round(i * (len(options) - 1) / (MOST_OPTIONS - 1))] for i in range(MOST_OPTIONS)]


@dataclass(frozen=True)
class Problem:
    """A target in coordinates in which its loss is a plain squared distance.

    Args:
        points: (out, r) float64, one row per output, r = min(out, in): P = points pointsᵀ, columns orthogonal and descending.
            Directions without energy in the calibration inputs come last, scaled to less than the smallest energy that was
            seen, in the order of the weight's plain norm in them.
        seen: number of leading columns with energy; only these count in the loss.
    """

    points: Tensor
    seen: int

    @staticmethod
    def of(weight: Tensor, stats: TargetStats) -> Problem:
        """From a weight (out, in) and its output gram or its group's gram."""
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
        """The squared distance of (out, k) codes times (k, r) atoms from the points."""
        return float((self.points - codes @ atoms)[:, : self.seen].square().sum())


def best_atoms(codes: Tensor, weight: Tensor) -> Tensor:
    """`codes⁺ weight`, (k, n): the atoms with the lowest loss in any metric of the columns (method of optimal directions).

    Args:
        codes: (out, k) float64.
        weight: (out, n).
    """
    lengths = codes.norm(dim=0)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    unit, weight = codes / lengths, weight.double()
    gram = unit.T @ unit
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed and factor.diagonal().min() > _CLEAR:  # the usual case, and many times faster
        return torch.cholesky_solve(unit.T @ weight, factor) / lengths[:, None]
    values, vectors = torch.linalg.eigh(gram)
    held = values > _RANGE * values[-1]
    kept, inner = vectors[:, held], values[held, None]
    atoms = kept @ ((kept.T @ (unit.T @ weight)) / inner)
    # normal equations square the condition number; one step of iterative refinement restores the lost digits
    atoms += kept @ ((kept.T @ (unit.T @ (weight - unit @ atoms))) / inner)
    return atoms / lengths[:, None]


def best_values(points: Tensor, codes: Tensor, mask: Tensor, atoms: Tensor, steps: int = 2) -> Tensor:
    """Codes (out, k) under the mask, moved towards least squares for fixed atoms by conjugate gradients in all rows at once.

    The loss falls with every step. Two steps are enough, because atoms and values are refitted in turn: eight steps reach the
    same loss in the end. Scaling nearly orthogonal atoms to unit length is all the preconditioning that they need.
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
    """Codes (out, k) float64, zero outside the mask, and their loss with the best atoms."""

    codes: Tensor
    mask: Tensor
    loss: float


def refined(problem: Problem, codes: Tensor, mask: Tensor, rounds: int) -> Coded:
    """Values and atoms refitted in turn with fixed support; the loss never rises."""
    atoms = best_atoms(codes, problem.points)
    for _ in range(rounds):
        codes = best_values(problem.points, codes, mask, atoms)
        atoms = best_atoms(codes, problem.points)
    return Coded(codes, mask, problem.loss(codes, atoms))


Split = tuple[int, int]
"""(atoms, nonzeros of the whole target)"""
Learn = Callable[[Problem, Sequence[Split]], Coded]
"""(problem, splits of equal bytes) -> the codes of the split with the lowest loss"""


@dataclass(frozen=True)
class DictionarySolution(Solution):
    """A target whose dictionary is learned for each size that is asked for.

    Args:
        weight: (out, in).
        problem: the same target in the metric of its inputs.
        settings: of the method.
        learn: the method's own algorithm.
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
        # divide the scale of each component evenly between atom and codes, which suits 16-bit storage
        a, b = coded.codes.norm(dim=0), atoms.norm(dim=1)
        scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
        return Dictionary.of(coded.codes * scale, coded.mask, atoms / scale[:, None], self.settings.pattern)

    def coded(self, choice: Choice) -> Coded:
        """The learned codes for a choice.

        Raises:
            ValueError: the choice is dense.
        """
        if choice.atoms is None or choice.nonzeros is None:
            raise ValueError("a dense target is not solved")
        if choice not in self._last:
            splits = [(choice.atoms, choice.nonzeros * len(self.weight))]
            if self.settings.atoms_per_nonzero == "auto":
                splits += self._splits(*splits[0])
            while len(self._last) > 1:  # the codes of two sizes are cached, because a probe asks for both again
                del self._last[next(iter(self._last))]
            self._last[choice] = self.learn(self.problem, splits)
        return self._last[choice]

    def _splits(self, atoms: int, nonzeros: int) -> list[Split]:
        """Other splits of exactly the same bytes, with clearly more or fewer atoms."""
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
