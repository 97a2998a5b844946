"""The solver: against brute force, against its own bound, and at the size of a 70B model."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc.compress.options import Choice
from lrc.errors import BudgetError
from lrc.plan.knapsack import PredictedOption, solve

WAYS = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 10)), min_size=1, max_size=5)


def _options(problem):
    return {
        f"t{number}": [PredictedOption(Choice(rank=i), nbytes, loss) for i, (nbytes, loss) in enumerate(ways)]
        for number, ways in enumerate(problem)
    }


def _best(options, budget):
    within = [c for c in itertools.product(*options.values()) if sum(way.nbytes for way in c) <= budget]
    return min((sum(way.loss for way in c) for c in within), default=None)


@settings(max_examples=150, deadline=None)
@given(st.lists(WAYS, min_size=1, max_size=5), st.integers(1, 160))
def test_the_solver_finds_what_brute_force_finds(problem, budget):
    options = _options(problem)
    best = _best(options, budget)
    if best is None:
        with pytest.raises(BudgetError, match="smallest forms"):
            solve(options, budget)
        return
    found = solve(options, budget)
    assert found.nbytes == sum(way.nbytes for way in found.options.values()) <= budget
    assert found.loss == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert found.bound <= found.loss * (1 + 1e-9) + 1e-12


def _large(layers=80, targets=7, ways=60):
    chance = random.Random(0)
    options = {}
    for number in range(layers * targets):
        scale, power, dense = chance.lognormvariate(0, 2), chance.uniform(0.5, 2), chance.choice([67, 8, 235]) * 2_000_000
        sizes = [dense * (i + 1) // (ways + 1) for i in range(ways)]
        options[f"t{number:03}"] = [
            *(PredictedOption(Choice(rank=i + 1), size, scale * (1 - size / dense) ** power) for i, size in enumerate(sizes)),
            PredictedOption(Choice(), dense, 0.0),
        ]
    return options


def test_a_70b_model_is_solved_and_a_larger_budget_never_loses_more():
    options = _large()
    dense = sum(ways[-1].nbytes for ways in options.values())
    losses = []
    for kept in (0.3, 0.6, 0.8):
        found = solve(options, int(kept * dense))
        assert found.nbytes <= kept * dense
        assert found.loss - found.bound <= 1e-3 * found.bound
        losses.append(found.loss)
    assert losses == sorted(losses, reverse=True)


def test_the_order_of_the_targets_changes_nothing():
    options = _large(4, 3, 9)
    budget = sum(ways[-1].nbytes for ways in options.values()) // 2
    turned = dict(reversed(options.items()))
    assert solve(options, budget).options == solve(turned, budget).options


def test_a_target_without_options_and_a_loss_that_is_no_number_are_refused():
    with pytest.raises(ValueError, match="has no option"):
        solve({"x": []}, 10)
    with pytest.raises(ValueError, match="not finite"):
        solve({"x": [PredictedOption(Choice(), 1, float("nan"))]}, 10)


def test_an_impossible_budget_says_what_is_possible():
    with pytest.raises(BudgetError, match="come to 30") as error:
        solve({"x": [PredictedOption(Choice(rank=1), 30, 1.0), PredictedOption(Choice(), 100, 0.0)]}, 20)
    assert "ratio up to 0.7" in str(error.value)
