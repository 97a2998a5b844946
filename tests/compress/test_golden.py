"""Whole methods against their papers' algorithms, written anew in numpy float64 with whitened weights, inverses and loops.

The methods that are one decomposition have theirs in test_methods.py, test_low_rank.py and test_quantized.py; here are those
that iterate.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from lrc.compress.base import GroupStats, TargetStats, get_method
from lrc.compress.dictionary import cospadi
from lrc.compress.options import Choice

SHAPES = [(18, 12), (12, 18)]


def problem(out_features: int, in_features: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight (out, in) and the gram (in, in) of correlated inputs whose channels differ in scale."""
    chance = np.random.default_rng(seed)
    x = chance.standard_normal((400, in_features)) @ (
        chance.standard_normal((in_features, in_features)) * np.logspace(-1, 1, in_features)
    )
    return chance.standard_normal((out_features, in_features)), x.T @ x / len(x)


def solve(name: str, weight: np.ndarray, gram: np.ndarray, **chosen: object):
    method = get_method(name)
    group = GroupStats(400, torch.tensor(gram))
    return method.solve(torch.tensor(weight), TargetStats(group), method.settings(**chosen))


def energy(error: np.ndarray, gram: np.ndarray) -> float:
    """Mean squared output error per token."""
    return float(np.trace(error @ gram @ error.T))


# ---- dictionaries


@pytest.mark.parametrize("shape", SHAPES)
def test_compot_in_the_coordinates_of_the_paper(shape):
    """arXiv 2602.15200: whiten by a Cholesky factor, start from the SVD, threshold and Procrustes in turn."""
    weight, gram = problem(*shape)
    whitened = weight @ np.linalg.cholesky(gram)
    count, atoms, nonzeros = len(weight), 8, 4
    dictionary = np.linalg.svd(whitened)[2][:atoms].T  # (in, k)
    for turn in range(7):
        codes = whitened @ dictionary
        least = np.sort(np.abs(codes), axis=None)[-count * nonzeros]
        codes = codes * (np.abs(codes) >= least)
        if turn < 6:
            left, _, right = np.linalg.svd(whitened.T @ codes, full_matrices=False)
            dictionary = left @ right
    expected = codes @ np.linalg.pinv(codes) @ weight
    solution = solve("compot", weight, gram, iterations=6, refits=0)
    form = solution.form(Choice(atoms=atoms, nonzeros=nonzeros))
    assert np.allclose(form.dense().numpy(), expected, atol=1e-8)
    assert solution.loss(Choice(atoms=atoms, nonzeros=nonzeros)) == pytest.approx(energy(weight - expected, gram), rel=1e-8)


def pursue(point: np.ndarray, atoms: np.ndarray, nonzeros: int) -> np.ndarray:
    """Orthogonal matching pursuit of one row by least squares."""
    chosen: list[int] = []
    residual = point
    for _ in range(nonzeros):
        scores = np.abs(atoms @ residual)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        values = np.linalg.lstsq(atoms[chosen].T, point, rcond=None)[0]
        residual = point - values @ atoms[chosen]
    code = np.zeros(len(atoms))
    code[chosen] = values
    return code


def coded(points: np.ndarray, atoms: np.ndarray, nonzeros: int, before: np.ndarray | None = None) -> np.ndarray:
    """Every row coded anew, unless its earlier code is as good."""
    fresh = np.stack([pursue(point, atoms, nonzeros) for point in points])
    if before is None:
        return fresh
    better = ((points - fresh @ atoms) ** 2).sum(1) < ((points - before @ atoms) ** 2).sum(1)
    return np.where(better[:, None], fresh, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_cospadi_in_the_coordinates_of_the_paper(shape, monkeypatch):
    """arXiv 2509.22075: pursuit and K-SVD on the whitened weight.

    Atoms start between rows here: a row that is an atom itself leaves nothing, and its other atoms would be rounding's choice.
    """
    weight, gram = problem(*shape, seed=1)
    whitened = weight @ np.linalg.cholesky(gram)
    count, nonzeros, steps = 8, 3, 8

    def between(points: torch.Tensor, number: int, _weight: torch.Tensor, _seed: int) -> torch.Tensor:
        return torch.nn.functional.normalize(points[:number] + points[1 : number + 1] / 2, dim=1)

    atoms = whitened[:count] + whitened[1 : count + 1] / 2
    atoms /= np.linalg.norm(atoms, axis=1)[:, None]
    codes = coded(whitened, atoms, nonzeros)
    for _ in range(3):
        for index in range(count):
            rows = np.flatnonzero(codes[:, index])
            left = whitened[rows] - codes[rows] @ atoms + np.outer(codes[rows, index], atoms[index])
            for _ in range(steps):
                turned = codes[rows, index] @ left
                atoms[index] = turned / np.linalg.norm(turned)
                codes[rows, index] = left @ atoms[index]
        codes = coded(whitened, atoms, nonzeros, codes)
    expected = codes @ np.linalg.pinv(codes) @ weight
    monkeypatch.setattr(cospadi, "first_atoms", between)
    solution = solve("cospadi", weight, gram, iterations=3, refits=0, tolerance=0.0, power_iterations=steps)
    form = solution.form(Choice(atoms=count, nonzeros=nonzeros))
    assert np.allclose(form.dense().numpy(), expected, atol=1e-7)


# ---- quantization


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """Each row to the nearest points of a symmetric grid of its own, with a step of eight significant bits."""
    half = 2 ** (bits - 1)
    largest = np.abs(values).max(1, keepdims=True)
    step = torch.tensor(largest / ((2**bits - 1) / 2)).bfloat16().double().numpy()
    return np.clip(np.round(values / step), -half, half - 1) * step


@pytest.mark.parametrize("shape", SHAPES)
def test_caldera_by_the_papers_loop(shape):
    """arXiv 2405.18886, algorithm 1, with rounding to nearest and 16-bit factors by a whitened SVD."""
    weight, gram = problem(*shape, seed=2)
    root = scipy.linalg.sqrtm(gram).real
    correction, found = np.zeros_like(weight), []
    for _ in range(4):
        base = rounded(weight - correction, 2)
        left, values, right = np.linalg.svd((weight - base) @ root, full_matrices=False)
        correction = (left[:, :3] * values[:3]) @ right[:3] @ np.linalg.inv(root)
        found.append(base + correction)
    losses = [energy(weight - each, gram) for each in found]
    grid = {"bits": 2, "group_size": 0, "symmetric": True, "base": "rtn"}
    solution = solve("caldera", weight, gram, rank=3, factor_bits=16, rounds=4, **grid)
    assert np.allclose(solution.form(Choice(3, 2)).dense().numpy(), found[int(np.argmin(losses))], atol=1e-8)
    assert solution.loss(Choice(3, 2)) == pytest.approx(min(losses), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_factors_on_a_grid_one_after_the_other(shape, bits):
    """ZeroQuant-V2's factors: the right one is rounded, the left one fitted to it by least squares and rounded."""
    weight, gram = problem(*shape, seed=3)
    base = rounded(weight, 4)
    left, values, right = np.linalg.svd(weight - base, full_matrices=False)
    grid = {"bits": 4, "group_size": 0, "symmetric": True}
    solution = solve("zeroquant-v2", weight, gram, rank=5, factor_bits=bits, **grid)
    # the sign of a component is anyone's choice, and a symmetric grid has one more point below 0 than above
    signs = np.sign((solution.error.left.numpy() * left).sum(0))[:5]
    right = rounded((signs * values[:5])[:, None] * right[:5], bits)
    left = (weight - base) @ right.T @ np.linalg.inv(right @ right.T)
    length = 2.0 ** np.round(np.log2(np.linalg.norm(left, axis=0)))  # columns of one size share a row's step
    expected = base + rounded(left / length, bits) @ (right * length[:, None])
    assert np.allclose(solution.form(Choice(5, 4, bits)).dense().numpy(), expected, atol=1e-9)


def test_components_that_inputs_hardly_see_do_not_coarsen_the_others():
    """At full rank the fit stretches such components; where their columns set the steps of a group, more rank loses more."""
    chance = np.random.default_rng(4)
    x = chance.standard_normal((400, 48)) @ (chance.standard_normal((48, 48)) * np.logspace(-2, 1, 48))
    solution = solve("caldera", chance.standard_normal((48, 48)), x.T @ x / len(x), rank=None, rounds=3, inner_rounds=3)
    half, full = (solution.loss(Choice(rank, 2, 4)) for rank in (24, 48))
    assert full < half / 2
