"""How dictionaries are learned: codes, atoms and the methods that seek them, against naive formulations in numpy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from dictionaries import NAMES, options, solve
from problems import error, problem, statistics
from pydantic import ValidationError

from lrc.compress.base import get_method
from lrc.compress.dictionary import compot, cospadi
from lrc.compress.dictionary.sparse_coding import Problem, best_atoms, best_values
from lrc.compress.options import Choice, Shape

SHAPES = [(24, 16), (16, 24), (20, 20)]


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    torch.manual_seed(0)


# --- the mathematics


def test_the_threshold_is_optimal_for_a_fixed_orthogonal_dictionary():
    points = torch.randn(4, 5, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64))[0]
    codes = points @ basis

    def loss(mask):
        return float((points - (codes * mask) @ basis.T).square().sum())

    mine = loss(compot.largest(codes, 6))
    every = [torch.tensor([(n >> i) & 1 for i in range(12)], dtype=torch.bool).view(4, 3) for n in range(2**12)]
    assert mine == pytest.approx(min(loss(mask) for mask in every if mask.sum() == 6))
    row = [mask for mask in every if (mask.sum(1) == 2).all()]
    assert loss(compot.largest(codes, 8, "row")) == pytest.approx(min(loss(mask) for mask in row))


def test_procrustes_is_scipys():
    points, codes = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    expected = scipy.linalg.orthogonal_procrustes(codes.numpy(), points.numpy())[0]
    assert np.allclose(compot.procrustes(points, codes).numpy().T, expected)


def naive_omp(point: np.ndarray, atoms: np.ndarray, nonzeros: int) -> np.ndarray:
    chosen, residual = [], point
    for _ in range(nonzeros):
        scores = np.abs(atoms @ residual)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        values = np.linalg.lstsq(atoms[chosen].T, point, rcond=None)[0]
        residual = point - atoms[chosen].T @ values
    code = np.zeros(len(atoms))
    code[chosen] = values
    return code


def test_omp_is_the_naive_one_by_least_squares(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    atoms = torch.nn.functional.normalize(torch.randn(15, 12, generator=generator, dtype=torch.float64), dim=1)
    expected = np.stack([naive_omp(point, atoms.numpy(), 5) for point in points.numpy()])
    codes, mask = cospadi.omp(points, atoms, 5)
    assert np.allclose(codes.numpy(), expected)
    assert (mask.sum(1) == 5).all()
    monkeypatch.setattr(cospadi, "_IN_CACHE", 1)  # a row at a time
    assert torch.allclose(cospadi.omp(points, atoms, 5)[0], codes)


def test_omp_survives_atoms_that_depend_on_each_other():
    atoms = torch.eye(3, 6, dtype=torch.float64).repeat(2, 1)
    atoms = torch.cat([atoms, torch.zeros(1, 6, dtype=torch.float64)])
    points = torch.randn(5, 6, dtype=torch.float64)
    codes, mask = cospadi.omp(points, atoms, 6)
    assert torch.isfinite(codes).all() and (mask.sum(1) == 6).all()
    assert torch.allclose((codes @ atoms)[:, :3], points[:, :3])


def test_k_svd_gives_each_atom_the_best_rank_one_term():
    """With many power iterations, and one atom, it is the leading singular pair of the rows that use it."""
    points = torch.randn(10, 6, dtype=torch.float64)
    mask = torch.tensor([True] * 7 + [False] * 3)[:, None]
    atoms = torch.nn.functional.normalize(torch.randn(1, 6, dtype=torch.float64), dim=1)
    codes, atoms = cospadi.k_svd(points, torch.where(mask, points @ atoms.T, 0), mask, atoms, 500)
    left, values, right = np.linalg.svd(points[:7].numpy())
    assert np.allclose((codes @ atoms)[:7].numpy(), values[0] * np.outer(left[:, 0], right[0]), atol=1e-6)
    assert (codes[7:] == 0).all()


def test_best_atoms_and_values_are_least_squares():
    points, codes = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    mask = torch.rand(20, 5) < 0.6
    expected = np.linalg.lstsq((codes * mask).numpy(), points.numpy(), rcond=None)[0]
    atoms = best_atoms(codes * mask, points)
    assert np.allclose(atoms.numpy(), expected)
    refit = best_values(points, codes * mask, mask, atoms, steps=20)
    for row in range(20):
        used = mask[row].numpy()
        values = np.linalg.lstsq(expected[used].T, points[row].numpy(), rcond=None)[0]
        assert np.allclose(refit[row].numpy()[used], values) and (refit[row].numpy()[~used] == 0).all()


def test_best_atoms_with_a_column_that_nobody_uses():
    codes = torch.randn(8, 4, dtype=torch.float64)
    codes[:, 2] = 0
    codes[:, 3] = codes[:, 1]
    weight = torch.randn(8, 5, dtype=torch.float64)
    assert np.allclose(best_atoms(codes, weight).numpy(), np.linalg.pinv(codes.numpy()) @ weight.numpy())


# --- the methods


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["input gram", "output gram"])
def test_the_loss_is_the_mean_output_error(name, shape, side):
    weight, x = problem(*shape, tokens=200)
    solution = solve(name, weight, statistics(x, weight if side == "output gram" else None), iterations=4)
    choice = Choice(atoms=8, nonzeros=4)
    assert solution.loss(choice) == pytest.approx(error(weight, solution.form(choice).dense(), x), rel=1e-6)
    assert solution.total == pytest.approx(error(weight, torch.zeros_like(weight), x), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{"refits": 0}, {"refits": 5}])
def test_the_loss_never_rises_with_iterations(name, settings):
    weight, x = problem(40, 24, tokens=200)
    counts = [1, 2, 5, 10, 20]
    losses = [solve(name, weight, statistics(x), iterations=n, **settings).loss(Choice(atoms=12, nonzeros=5)) for n in counts]
    if settings["refits"]:  # least squares on another support may end a little higher
        assert losses[-1] < losses[0]
    else:
        assert all(a >= b * (1 - 1e-3) for a, b in pairwise(losses)) and losses[-1] < losses[0]


def test_threshold_and_procrustes_alone_are_monotone_to_the_last_digit():
    weight, x = problem(40, 24, tokens=200)
    points = Problem.of(weight, statistics(x)).points
    dictionary, losses = torch.eye(24, 12, dtype=torch.float64), []
    for _ in range(30):
        codes = points @ dictionary
        codes = codes * compot.largest(codes, 200)
        losses.append(float((points - codes @ dictionary.T).square().sum()))
        dictionary = compot.procrustes(points, codes)
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_falls_with_the_budget_and_beats_low_rank_with_as_many_atoms(name, shape):
    weight, x = problem(*shape, tokens=200)
    solution, low = solve(name, weight, statistics(x)), get_method("svd-llm").solve(weight, statistics(x), None)
    losses = [solution.loss(Choice(atoms=2 * s, nonzeros=s)) for s in (1, 2, 4, 8)]
    assert all(a > b for a, b in pairwise(losses))
    for s, loss in zip((1, 2, 4, 8), losses, strict=True):
        # s atoms that all rows share are one dictionary among many
        assert loss < low.loss(Choice(rank=s)) * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 12), (12, 1)])
@pytest.mark.parametrize("tokens", [3, 200])
def test_the_full_budget_is_the_dense_weight(name, shape, tokens):
    weight, x = problem(*shape, tokens=tokens)
    full = min(shape)
    for stats in (statistics(x), statistics(x, weight)):
        solution = solve(name, weight, stats)
        form = solution.form(Choice(atoms=full, nonzeros=full))
        assert torch.allclose(form.dense(), weight, atol=1e-6 * float(weight.abs().max()))
        assert solution.loss(Choice(atoms=full, nonzeros=full)) <= 1e-10 * solution.total


@pytest.mark.parametrize("name", NAMES)
def test_a_singular_gram_loses_nothing_that_calibration_saw_and_serves_the_rest(name):
    weight, x = problem(24, 16, tokens=3)
    for stats in (statistics(x), statistics(x, weight)):
        few, more = (solve(name, weight, stats).form(Choice(atoms=n, nonzeros=n)).dense() for n in (3, 10))
        assert error(weight, few, x) <= 1e-8 * error(weight, torch.zeros_like(weight), x)
        # what is left beyond is spent on the weight's own norm
        assert float((weight - more).norm()) < 0.8 * float((weight - few).norm())
        solution = solve(name, weight, stats)
        form = solution.form(Choice(atoms=8, nonzeros=4))
        assert torch.isfinite(form.dense()).all()
        assert solution.loss(Choice(atoms=8, nonzeros=4)) == pytest.approx(
            error(weight, form.dense(), x), rel=1e-4, abs=1e-9 * solution.total
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_target_that_saw_no_token_is_coded_by_its_plain_norm(name):
    weight, _ = problem(24, 16, tokens=1)
    solution = solve(name, weight, statistics(torch.zeros(1, 16, dtype=torch.float64)))
    error_of = [float((weight - solution.form(Choice(atoms=2 * s, nonzeros=s)).dense()).norm()) for s in (2, 6)]
    values = torch.linalg.svdvals(weight)
    assert error_of[0] < float(values[2:].norm()) and error_of[1] < error_of[0]
    assert solution.total == 0 == solution.loss(Choice(atoms=4, nonzeros=2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (2, 9)])
def test_rank_one_and_degenerate_weights(name, shape):
    weight, x = problem(*shape, tokens=50)
    choice = Choice(atoms=1, nonzeros=1)
    assert torch.isfinite(solve(name, weight, statistics(x)).form(choice).dense()).all()
    for bad in (torch.zeros(12, 8, dtype=torch.float64), torch.ones(12, 8, dtype=torch.float64)):
        _, x = problem(12, 8, tokens=50)
        form = solve(name, bad, statistics(x)).form(Choice(atoms=4, nonzeros=2))
        assert torch.allclose(form.dense(), bad, atol=1e-6)


def test_auto_is_not_worse_than_the_usual_split():
    weight, x = problem(60, 40, tokens=300)
    for choice in [o.choice for o in options("compot", Shape(60, 40, 8), atoms_per_nonzero="auto")[5::9]]:
        usual = solve("compot", weight, statistics(x)).loss(choice)
        # splits are compared before they are finished, so a near tie may be decided differently
        assert solve("compot", weight, statistics(x), atoms_per_nonzero="auto").loss(choice) <= usual * 1.02


@pytest.mark.parametrize(("shape", "size"), [((96, 40), 0.6), ((40, 96), 0.6), ((60, 60), 0.8)])
def test_auto_takes_a_split_that_loses_hardly_more_than_the_best_learned_to_the_end(shape, size):
    weight, x = problem(*shape, tokens=400)
    most = size * weight.numel() * 8
    choice = [o for o in options("compot", Shape(*shape, 8), atoms_per_nonzero="auto") if o.nbytes <= most][-1].choice
    solution = solve("compot", weight, statistics(x), atoms_per_nonzero="auto")
    first = (choice.atoms, choice.nonzeros * shape[0])
    splits = [first, *solution._splits(*first)]
    assert len(splits) > 2
    losses = [compot.learn(solution.problem, [split], 20, 10).loss for split in splits]
    assert solution.loss(choice) <= 1.05 * min(losses) < 0.95 * max(losses)


def test_a_seed_is_a_seed_whatever_was_drawn_before():
    weight, x = problem(30, 20, tokens=100)
    choice = Choice(atoms=10, nonzeros=5)
    first = solve("cospadi", weight, statistics(x), iterations=2).form(choice).dense()
    torch.manual_seed(7)
    assert torch.equal(solve("cospadi", weight, statistics(x), iterations=2).form(choice).dense(), first)
    other = solve("cospadi", weight, statistics(x), iterations=2, seed=1).form(choice).dense()
    assert not torch.allclose(other, first)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("compot", {"atoms_per_nonzero": 0.5}, "between 1 and 64"),
        ("compot", {"atoms_per_nonzero": 3, "pattern": "2:4"}, "every second atom"),
        ("compot", {"atoms_per_nonzero": "auto", "share": "row"}, "same bytes"),
        ("cospadi", {"pattern": "2:4"}, "compot"),
        ("cospadi", {"atoms_per_nonzero": "auto"}, "same bytes"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(name, settings, said):
    with pytest.raises(ValidationError, match=said):
        get_method(name).settings(**settings)
