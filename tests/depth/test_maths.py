"""The mathematics of repairs, each map against a float64 formulation, and of choosing what goes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from lrc.depth.base import greedily
from lrc.depth.repair import divided, runs_of
from lrc.depth.repairs.hadamard import hadamard, orthogonal
from lrc.depth.repairs.linear_map import LeastSquares
from lrc.depth.repairs.linear_patch import Ratios
from lrc.errors import CalibrationError


@pytest.mark.parametrize("size", [1, 2, 8, 12, 20, 28, 36, 48, 60, 576, 768, 896, 960])
def test_hadamard_matrices_hold_only_signs_and_are_orthogonal(size):
    found = hadamard(size)
    assert np.array_equal(np.abs(found), np.ones((size, size)))
    assert np.array_equal(found.T @ found, size * np.eye(size))


@pytest.mark.parametrize("size", [3, 30, 92, 576, 4096 // 8])
def test_every_width_has_an_orthogonal_basis_that_spreads_one_large_channel(size):
    basis = orthogonal(size)
    assert torch.allclose(basis.T @ basis, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert float(basis[0].abs().max()) <= (2 / size) ** 0.5 + 1e-12


def _states(tokens=200, width=12, seed=0):
    chance = np.random.default_rng(seed)
    x = chance.standard_normal((tokens, width)) + 0.5
    y = x @ (np.eye(width) + 0.3 * chance.standard_normal((width, width))) + 1.0 + 0.1 * chance.standard_normal((tokens, width))
    return x, y


def _fitted(fit, x, y, pieces=(70, 131)):
    for one, other in zip(np.split(x, pieces), np.split(y, pieces), strict=True):
        fit.add(torch.tensor(one), torch.tensor(other))
    matrix, bias = fit.change()
    return matrix.numpy(), None if bias is None else bias.numpy()


def test_linear_patch_is_the_papers_product():
    x, y = _states(width=16)
    h = scipy.linalg.hadamard(16) / 4  # Sylvester's own
    matrix, bias = _fitted(Ratios(16), x, y)
    wanted = h @ np.diag(np.abs(y @ h).mean(0) / np.abs(x @ h).mean(0)) @ h.T
    assert bias is None
    assert np.allclose(np.eye(16) + matrix, wanted, atol=1e-12)


def test_linear_patch_gives_every_channel_the_size_that_it_had():
    x, y = _states(width=12)
    patched = x + x @ _fitted(Ratios(12), x, y)[0].T
    basis = orthogonal(12).numpy()
    assert np.allclose(np.abs(patched @ basis).mean(0), np.abs(y @ basis).mean(0), rtol=1e-12)
    assert np.allclose(_fitted(Ratios(12), np.zeros_like(x), y)[0], 0)  # a channel that no state reaches stays


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_least_squares_is_numpys(bias, damping):
    x, y = _states()
    matrix, shift = _fitted(LeastSquares(12, damping, bias), x, y)
    rows, goal = (x - x.mean(0), (y - x) - (y - x).mean(0)) if bias else (x, y - x)
    ridge = np.sqrt(damping * np.mean(np.sum(rows**2, 0)))  # rows that pull towards leaving the state as it is
    stacked = np.vstack([rows, ridge * np.eye(12)]), np.vstack([goal, np.zeros((12, 12))])
    wanted = np.linalg.lstsq(*stacked, rcond=None)[0].T
    assert np.allclose(matrix, wanted, atol=1e-9)
    if bias:
        assert np.allclose(shift, (y - x).mean(0) - wanted @ x.mean(0), atol=1e-9)
    else:
        assert shift is None


def test_directions_that_no_state_has_stay_as_they_are():
    x, y = _states(tokens=5)  # rank 5 of 12
    matrix, _ = _fitted(LeastSquares(12, 0.0, False), x, y, pieces=(2, 3))
    unseen = np.linalg.svd(x)[2][5:]
    assert np.allclose(matrix @ unseen.T, 0, atol=1e-8)
    assert np.allclose(x + x @ matrix.T, y, atol=1e-7)


def test_greedy_choice_sees_what_earlier_removals_did():
    # alone 0 is cheapest; once it is gone 1, its stand-in, is dear, and 2 goes
    def trial(sets):
        return [len(s) + (5.0 if {0, 1} <= s else 0.0) + 0.1 * sum(s) for s in sets]

    assert greedily(trial, [2, 1, 0], lambda gone: len(gone) == 2) == [0, 2]


def test_runs_and_held_out_windows():
    assert runs_of([7, 2, 3, 9, 8]) == [(2, 4), (7, 10)]
    tokens = torch.arange(16 * 32).reshape(16, 32)
    windows = divided(tokens, 0.125)
    train, held = windows.train, windows.held_out
    assert train.shape == (14, 32) and held.shape == (2, 32)
    assert not np.intersect1d(train.numpy(), held.numpy()).size
    assert divided(tokens[:2], 0.9).train.numel() == divided(tokens[:2], 0.9).held_out.numel() == 32  # something to fit to
    assert divided(torch.zeros(64, 2048, dtype=torch.int64), 0.5).held_out.shape == (16, 512)
    with pytest.raises(CalibrationError, match="two calibration samples"):
        divided(tokens[:1], 0.5)
