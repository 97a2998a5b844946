"""CoSpaDi: a sparse code over a learned, free dictionary (OMP and K-SVD in the activations' metric).

Each row of the weight becomes a sum of exactly s of k atoms. The method codes the rows by orthogonal matching pursuit (OMP),
then updates the atoms one by one together with their codes (K-SVD), and repeats both until the loss stops falling.

When to use: to compare with published CoSpaDi results. `compot` comes as close in a small part of the time.

Cost: per iteration and target, OMP reads about out · s² · k / 2 numbers and K-SVD does 2 · 8 · out · s · r multiplications: for
a 1536 x 576 target at ratio 0.2 some ten seconds on one core, times 60 iterations. Use a GPU. Statistics: as for `svd-llm`.

Source: CoSpaDi, arXiv 2509.22075: weighted metric, k/s = 2, exact s per column of the codes, 8 power iterations per atom with
fixed support, 60 iterations, atoms initialised with random columns of the weighted weight; `update: mod` is its method of
optimal directions. Differences from the paper: no Cholesky factor, no damping and no inverse (sparse_coding.py); a row keeps
its previous code where OMP finds no better one, so the loss never rises; values and atoms are refitted at the end (`refits`)
with fixed support; learning stops early when an iteration gains less than `tolerance`. The random start depends on `seed` and
on the weight's own bytes, so it does not depend on the order in which targets are solved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..base import TargetStats, method
from ..options import Option, Shape, at_sizes
from .sparse_coding import (
    Coded,
    DictionarySettings,
    DictionarySolution,
    Problem,
    Split,
    best_atoms,
    dictionary_options,
    refined,
)

# Bytes of workspace for the rows that OMP codes at once. On a CPU they must fit into its cache: that halves the time.
_IN_CACHE, _AT_ONCE = 8 * 2**20, 256 * 2**20
_DEPENDENT = 1e-10  # an atom with a smaller squared length is in the span of the atoms chosen before it


class CospadiSettings(DictionarySettings):
    """Settings of `cospadi`."""

    iterations: int = Field(60, ge=1, le=10_000, description="at most this many rounds of coding and dictionary update")
    tolerance: float = Field(
        1e-4, ge=0, lt=1, description="stop when an iteration lowers the loss by less than this fraction of it"
    )
    update: Literal["k-svd", "mod"] = Field("k-svd", description="atom by atom with its codes, or all atoms by least squares")
    power_iterations: int = Field(8, ge=1, le=1000, description="of each atom's rank-1 problem in K-SVD")
    seed: int = Field(42, ge=0, description="of the random initial atoms")

    @model_validator(mode="after")
    def _pursuit_fits(self) -> CospadiSettings:
        if self.pattern != "free":
            raise ValueError("matching pursuit cannot make the pattern 2:4; method compot can")
        if self.atoms_per_nonzero == "auto":
            raise ValueError("equally many codes in each row cannot fill the same bytes at every split: give atoms_per_nonzero")
        return self


def _most(out_features: int, in_features: int) -> int:
    return out_features  # atoms start as rows of the weight


def options(shape: Shape, settings: Any, multiple: int = 1) -> list[Option]:
    """Dictionaries with up to as many atoms as the target has rows."""
    return dictionary_options(shape, settings, multiple, _most)


def omp(points: Tensor, atoms: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of every row: codes (n, k) and their mask, with exactly `nonzeros` entries in each row.

    Each step chooses the atom that correlates most with the residual, and makes the residual orthogonal to all chosen atoms.
    Rows are processed together. A step needs only the inner products of the residual with the atoms; a new orthogonalised atom
    changes them by a multiple of its own inner products.

    Args:
        points: (n, r).
        atoms: (k, r) of unit length, or zero.
        nonzeros: at most k.
    """
    codes = torch.zeros(len(points), len(atoms), dtype=points.dtype, device=points.device)
    mask = torch.zeros(codes.shape, dtype=torch.bool, device=points.device)
    gram = atoms @ atoms.T
    workspace = _IN_CACHE if points.device.type == "cpu" else _AT_ONCE
    rows = max(1, workspace // (points.element_size() * len(atoms) * (nonzeros + 1)))
    for start in range(0, len(points), rows):
        part = slice(start, start + rows)
        chosen, values = _pursue(points[part] @ atoms.T, gram, nonzeros)
        codes[part].scatter_(1, chosen, values)
        mask[part].scatter_(1, chosen, True)
    return codes, mask


def _pursue(correlation: Tensor, gram: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """The chosen atoms and their values, both (n, nonzeros), from inner products (n, k) with the atoms and the atoms' gram."""
    n, k = correlation.shape
    residual = correlation.clone()
    free = torch.ones(n, k, dtype=torch.bool, device=gram.device)
    chosen = torch.zeros(n, nonzeros, dtype=torch.long, device=gram.device)
    directions = correlation.new_zeros(n, nonzeros, k)  # inner products of the orthogonalised atoms with all atoms
    factor = torch.eye(nonzeros, dtype=gram.dtype, device=gram.device).repeat(n, 1, 1)  # lower triangular
    along = correlation.new_zeros(n, nonzeros)
    every = torch.arange(n, device=gram.device)
    for step in range(nonzeros):
        atom = residual.abs().masked_fill_(~free, -1).argmax(1)
        chosen[:, step], free[every, atom] = atom, False
        before = directions[every, :step, atom]  # (n, step)
        squared = gram[atom, atom] - before.square().sum(1)
        new = squared > _DEPENDENT
        length = torch.where(new, squared, torch.ones_like(squared)).sqrt()
        direction = gram[atom] - torch.bmm(before[:, None], directions[:, :step])[:, 0]
        direction = direction / length[:, None] * new[:, None]
        directions[:, step] = direction
        factor[:, step, :step] = before * new[:, None]
        factor[:, step, step] = length
        along[:, step] = residual[every, atom] / length * new
        residual -= along[:, step, None] * direction
    values = torch.linalg.solve_triangular(factor.mT, along[:, :, None], upper=True)[:, :, 0]
    return chosen, values


def k_svd(points: Tensor, codes: Tensor, mask: Tensor, atoms: Tensor, power_iterations: int) -> tuple[Tensor, Tensor]:
    """One pass over the atoms: each atom and its codes become the best rank-1 fit to the residual of the others; fixed support.

    Args:
        points: (n, r).
        codes, mask: (n, k).
        atoms: (k, r) of unit length.

    Returns:
        The new codes and atoms (unit length); an atom that no row uses stays as it is.
    """
    codes, atoms = codes.clone(), atoms.clone()
    residual = points - codes @ atoms
    for index in range(len(atoms)):
        rows = mask[:, index].nonzero()[:, 0]
        value, atom = codes[rows, index], atoms[index]
        left = residual[rows] + value[:, None] * atom
        for _ in range(power_iterations):
            turned = value @ left
            length = turned.norm()
            if not length > 0:  # no row uses the atom, or the residual is zero: any unit atom is as good
                break
            atom = turned / length
            value = left @ atom
        residual[rows] = left - value[:, None] * atom
        codes[rows, index], atoms[index] = value, atom
    return codes, atoms


def _unit(atoms: Tensor) -> tuple[Tensor, Tensor]:
    lengths = atoms.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    return atoms / lengths[:, None], lengths


def first_atoms(points: Tensor, count: int, weight: Tensor, seed: int) -> Tensor:
    """(count, r) random rows of the points, scaled to unit length; the random state is the seed and the weight's bytes."""
    content = weight.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    digest = hashlib.sha256(content + seed.to_bytes(8, "little")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    order = torch.randperm(len(points), generator=generator)[:count]
    return _unit(points[order.to(points.device)])[0]


def learn(problem: Problem, atoms: Tensor, nonzeros: int, settings: CospadiSettings) -> Coded:
    """Coding and dictionary update in turn, starting with these atoms (k, r); refined at the end. `nonzeros` is per row."""
    points = problem.points
    codes, mask = omp(points, atoms, nonzeros)
    loss = float((points - codes @ atoms).square().sum())
    for _ in range(settings.iterations):
        if settings.update == "k-svd":
            codes, atoms = k_svd(points, codes, mask, atoms, settings.power_iterations)
        else:
            atoms, lengths = _unit(best_atoms(codes, points))
            codes = codes * lengths
        kept = (points - codes @ atoms).square().sum(1)
        fresh, fresh_mask = omp(points, atoms, nonzeros)
        better = ((points - fresh @ atoms).square().sum(1) < kept)[:, None]
        codes, mask = torch.where(better, fresh, codes), torch.where(better, fresh_mask, mask)
        before, loss = loss, float((points - codes @ atoms).square().sum())
        if before - loss <= settings.tolerance * before:
            break
    return refined(problem, codes, mask, settings.refits)


@method(
    "cospadi",
    source="arXiv 2509.22075",
    needs=["output_gram"],
    settings=CospadiSettings,
    options=options,
    measured=at_sizes(0.3, 0.6),
)
def solve(weight: Tensor, stats: TargetStats, settings: CospadiSettings) -> DictionarySolution:
    """A learned dictionary for the weight (out, in), in the metric of the calibration inputs."""

    def learned(problem: Problem, splits: Sequence[Split]) -> Coded:
        """Codes of the only split."""
        ((atoms, nonzeros),) = splits  # 'auto' is refused
        each = nonzeros // len(problem.points)
        if each >= min(atoms, problem.points.shape[1]):  # there are no zeros to place: the plain projection is optimal
            codes = problem.points[:, :atoms]
            codes = torch.nn.functional.pad(codes, (0, atoms - codes.shape[1]))
            mask = torch.zeros(codes.shape, dtype=torch.bool, device=codes.device)
            mask[:, :each] = True
            return refined(problem, codes * mask, mask, 0)
        return learn(problem, first_atoms(problem.points, atoms, weight, settings.seed), each, settings)

    return DictionarySolution(weight, Problem.of(weight, stats), settings, learned, _most(*weight.shape))
