"""Every method against an independent float64 formulation, on tall, wide, rank-1 and singular cases."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import error, problem, statistics

from lrc.compress.base import TargetStats, get_method, method, methods
from lrc.compress.linalg import OutputDirections, root
from lrc.compress.options import Choice, Shape, break_even, low_rank_options
from lrc.errors import BudgetError, NonFiniteError, RequestError
from lrc.plan.knapsack import uniform

SHAPES = [(24, 16), (16, 24), (20, 20), (1, 12), (12, 1)]
# methods that a rank and forward statistics say everything to
LOW_RANK = ["asvd", "energy", "lord", "svd", "svd-llm", "welore"]
NAMES = sorted(name for name, chosen in methods().items() if name in LOW_RANK)


def solve(name: str, weight: torch.Tensor, stats: TargetStats):
    chosen = get_method(name)
    return chosen.solve(weight, stats, chosen.settings())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["input gram", "output gram"])
def test_svd_llm_error_is_the_sum_of_discarded_eigenvalues(shape, side):
    weight, x = problem(*shape, tokens=200)
    stats = statistics(x, weight if side == "output gram" else None)
    solution = solve("svd-llm", weight, stats)
    # independent: generalised singular values by scipy's Cholesky whitening, as the paper writes it
    gram = (x.T @ x / len(x)).numpy()
    values = scipy.linalg.svdvals(weight.numpy() @ np.linalg.cholesky(gram)) ** 2
    for rank in range(min(shape) + 1):
        discarded = values[rank:].sum()
        measured = error(weight, solution.form(Choice(rank)).dense(), x)
        assert measured == pytest.approx(discarded, rel=1e-5, abs=1e-9 * values.sum())
        assert solution.loss(Choice(rank)) == pytest.approx(discarded, rel=1e-5, abs=1e-9 * values.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_is_never_worse_than_any_other_method_in_its_metric(shape):
    weight, x = problem(*shape, tokens=200)
    best = solve("svd-llm", weight, statistics(x))
    for name in NAMES:
        other = solve(name, weight, statistics(x))
        for rank in range(1, min(shape)):
            mine = error(weight, best.form(Choice(rank)).dense(), x)
            assert mine <= error(weight, other.form(Choice(rank)).dense(), x) * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(out_features=st.integers(1, 20), in_features=st.integers(1, 20), tokens=st.integers(1, 60), seed=st.integers(0, 99))
def test_full_rank_is_exact_and_loss_never_rises(name, out_features, in_features, tokens, seed):
    """Fewer tokens than channels (a singular gram) included."""
    weight, x = problem(out_features, in_features, tokens, seed)
    full = min(out_features, in_features)
    for stats in (statistics(x), statistics(x, weight)):
        solution = solve(name, weight, stats)
        losses = [solution.loss(Choice(rank)) for rank in range(full + 1)]
        assert all(a >= b - 1e-9 * losses[0] for a, b in pairwise(losses))
        assert losses[0] == pytest.approx(solution.total)
        dense = solution.form(Choice(full)).dense()
        assert torch.allclose(dense, weight, atol=1e-6 * float(weight.abs().max()))


def test_a_singular_gram_gives_the_optimum_and_then_the_plain_one():
    weight, x = problem(12, 16, tokens=3)
    solution = solve("svd-llm", weight, statistics(x))
    assert solution.loss(Choice(3)) <= 1e-9 * solution.total
    at = [float((weight - solution.form(Choice(rank)).dense()).norm()) for rank in range(3, 13)]
    assert all(a >= b - 1e-9 for a, b in pairwise(at))
    # directions that calibration never saw come in the order of the weight's own norm in them
    seen = solution.form(Choice(3)).left
    basis, _ = torch.linalg.qr(seen)
    values = torch.linalg.svdvals(weight - basis @ basis.T @ weight)
    assert at[2] == pytest.approx(float(values[2:].norm()), rel=1e-6)


def test_no_statistics_at_all_is_plain_svd():
    """An expert that saw no token."""
    weight, _ = problem(12, 10, tokens=1)
    stats = statistics(torch.zeros(1, 10, dtype=torch.float64))
    for name in NAMES:
        approximation = solve(name, weight, stats).form(Choice(4)).dense()
        assert float((weight - approximation).norm()) == pytest.approx(float(torch.linalg.svdvals(weight)[4:].norm()), rel=1e-6)


def test_svd_and_asvd_against_numpy():
    weight, x = problem(14, 18, tokens=100)
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    expected = (left[:, :5] * values[:5]) @ right[:5]
    assert np.allclose(solve("svd", weight, statistics(x)).form(Choice(5)).dense().numpy(), expected)
    scale = np.abs(x.numpy()).mean(0) ** 0.5
    left, values, right = np.linalg.svd(weight.numpy() * scale, full_matrices=False)
    expected = (left[:, :5] * values[:5]) @ right[:5] / scale
    assert np.allclose(solve("asvd", weight, statistics(x)).form(Choice(5)).dense().numpy(), expected)


def test_both_sides_of_the_eigenproblem_agree():
    for shape in SHAPES:
        weight, x = problem(*shape, tokens=80)
        gram = x.T @ x / len(x)
        one = OutputDirections(weight, gram)
        two = OutputDirections(weight, output_gram=weight @ gram @ weight.T)
        assert torch.allclose(one.values, two.values, rtol=1e-6, atol=1e-9 * float(one.values[0]))
        rank = max(1, min(shape) // 2)
        a, b = one.basis(rank), two.basis(rank)
        assert torch.allclose(a @ a.T, b @ b.T, atol=1e-6)
        assert torch.allclose(a.T @ a, torch.eye(rank, dtype=torch.float64), atol=1e-12)


def test_only_a_tall_target_wants_the_root_of_its_group_s_gram():
    """An eigenproblem of the inner width of a feed-forward would take longer than everything else."""
    asked = []
    for shape in SHAPES:
        weight, x = problem(*shape, tokens=80)
        gram = x.T @ x / len(x)
        told = OutputDirections(weight, gram, gram_root=lambda gram=gram, shape=shape: asked.append(shape) or root(gram))
        assert torch.allclose(told.values, OutputDirections(weight, gram).values, rtol=1e-9, atol=1e-12)
    assert asked == [shape for shape in SHAPES if shape[0] > shape[1]]
    with pytest.raises(ValueError, match="needs the gram"):
        OutputDirections(weight)


def test_a_statistic_that_is_not_finite_is_an_error():
    weight, x = problem(6, 6, tokens=20)
    x[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match="not finite"):
        solve("svd-llm", weight, statistics(x))


def chosen(out_features: int, in_features: int, ratio: float, multiple: int = 1) -> Choice:
    shape = Shape(out_features, in_features, element=2)
    return uniform({"x": (shape.nbytes, low_rank_options(shape, None, multiple))}, ratio)["x"].choice


def test_ranks_follow_each_target_and_decimals_do_not_matter():
    assert chosen(576, 576, 0.2).rank == 230 and chosen(192, 576, 0.2).rank == 115
    assert chosen(100, 100, 0.4).rank == 30
    assert chosen(100, 100, 0.4, multiple=8).rank == 24
    assert chosen(100, 100, 0.0).dense


@given(out_features=st.integers(4, 300), in_features=st.integers(4, 300), ratio=st.floats(0.01, 0.7))
def test_a_chosen_rank_keeps_the_promise(out_features, in_features, ratio):
    try:
        choice = chosen(out_features, in_features, ratio)
    except BudgetError:
        assert (1 - ratio) * out_features * in_features < out_features + in_features
        return
    if not choice.dense:
        kept = choice.rank * (out_features + in_features) / (out_features * in_features)
        assert kept <= 1 - ratio + 1e-6
        assert choice.rank <= break_even(out_features, in_features)


@pytest.mark.parametrize("ratio", [1.0, 40, -0.1])
def test_a_ratio_out_of_range_says_so(ratio):
    with pytest.raises(BudgetError, match="ratio"):
        chosen(8, 8, ratio)


def test_a_typo_in_a_method_name_is_helped():
    with pytest.raises(RequestError, match="Did you mean 'svd-llm'"):
        get_method("svd-lm")


def test_a_method_that_asks_for_unknown_statistics_is_refused():
    with pytest.raises(ValueError, match="unknown statistics"):
        method("nonsense", source="none", needs=["gramm"])
