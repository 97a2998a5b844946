"""Rules and limits: formulas against independent ones, and each through the whole pipeline within its budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import compress

from lrc.checkpoint.location import locate
from lrc.commands.sweep_rows import planned_jobs
from lrc.compress.base import Curve, GroupStats, TargetStats, get_method
from lrc.compress.options import Choice, Option
from lrc.errors import BudgetError, RecipeError
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.plan.rules.base import Open, in_proportion, rules
from lrc.run.losses.importance_scores import effective_rank, first_order
from lrc.run.verify import verify

NAMES = ["effective-rank", "importance", "log-loss", "zero-sum"]


def told(**overrides) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(overrides.pop("recipe", "svd-llm"), overrides)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("key", "says"), [("droppable", "never paid"), ("uniform_within", "allocation: uniform"), ("correction", "refine: block")]
)
def test_a_key_that_is_gone_says_what_to_do(key, says):
    assert f"the key '{key}' is gone" in (message := told(**{key: "role"}))
    assert says in message


def target(name: str, scores: tuple[float, ...], ranks: int, each: int = 10, role: str = "r", group: str = "") -> Open:
    options = tuple(Option(Choice(rank=k), k * each) for k in range(1, ranks + 1))
    losses = tuple(float(ranks + 1 - k) for k in range(1, ranks + 1))
    return Open(name, role, group or name, (ranks + 1) * each, Curve(ranks + 1.0, options, losses, None, scores))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_rule_keeps_to_the_budget_on_the_real_path(name, family, tiny_checkpoints, tiny_text_file, tmp_path):
    more = {"gradients.labels": "data"} if name == "zero-sum" else {}
    if name == "effective-rank" and family == "gpt2":  # one fused matrix for q, k and v
        with pytest.raises(BudgetError, match="qk_to_v=0"):
            compress(tiny_checkpoints(family), tmp_path / "out", tiny_text_file, ratio=0.3, allocation=name)
        more = {"allocation_settings": {"qk_to_v": 0}}
    plan = compress(tiny_checkpoints(family), tmp_path / "two", tiny_text_file, ratio=0.3, allocation=name, **more)
    verify(tmp_path / "two")
    assert 0.3 <= plan.ratio <= 0.36
    assert len({step.choice.rank for step in plan.steps}) > 3, "it shares out unevenly"


def test_first_order_changes_are_those_of_dropping_one_component():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    gradient = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    solution = get_method("svd-llm").solve(weight, TargetStats(GroupStats(40, x.T @ x / 40)), None)
    form = solution.form(Choice(rank=5))
    found = first_order(form.left, form.right, gradient)
    for rank in range(5):
        before, after = (solution.form(Choice(rank=r)).dense() if r else torch.zeros(7, 5).double() for r in (rank + 1, rank))
        assert float(found[rank]) == pytest.approx(float((gradient * (after - before)).sum()), abs=1e-9)


def test_effective_rank_counts_equal_directions_and_never_passes_their_number():
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.zeros(4)) == 1
    values = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = (values / values.sum()).numpy()
    assert effective_rank(values) == pytest.approx(math.exp(-(p * np.log(p)).sum())) and effective_rank(values) < 9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 5), st.floats(5, 20)), min_size=1, max_size=8), st.floats(0, 1))
def test_sizes_in_proportion_stay_in_bounds_and_add_up(units, place):
    weights = {str(i): w for i, (w, _, _) in enumerate(units)}
    low = {str(i): a for i, (_, a, _) in enumerate(units)}
    high = {str(i): b for i, (_, _, b) in enumerate(units)}
    total = sum(low.values()) + place * (sum(high.values()) - sum(low.values()))
    sizes = in_proportion(weights, low, high, total)
    assert all(low[name] <= sizes[name] <= high[name] for name in sizes)
    assert sum(sizes.values()) == pytest.approx(total, rel=1e-9, abs=1e-9)
    free = [sizes[name] / weights[name] for name in sizes if low[name] + 1e-9 < sizes[name] < high[name] - 1e-9]
    assert not free or max(free) == pytest.approx(min(free), rel=1e-6)


def test_effective_rank_gives_ranks_as_the_root_and_moves_from_q_and_k_to_v():
    rule = rules()["effective-rank"]
    pair = [target("a", (4.0,), 60), target("b", (16.0,), 60)]
    found = rule.share(pair, 600, rule.settings(qk_to_v=0))
    assert [found[n].choice.rank for n in "ab"] == [20, 40]
    three = [target(n, (4.0,), 60, group="q") for n in "qkv"]
    found = rule.share(three, 600, rule.settings(qk_to_v=0.3))
    assert [found[n].choice.rank for n in "qkv"] == [14, 14, 32]


def test_zero_sum_keeps_the_running_sum_near_zero():
    rule = rules()["zero-sum"]
    up, down = target("up", (5.0, 4.0, 3.0, 2.0, 1.0), 4), target("down", (-5.0, -4.0, -3.0, -2.0, -1.0), 4)
    found = rule.share([up, down], 60, rule.settings())
    gone = {name: sum(t.curve.scores[found[name].choice.rank or 5 :]) for name, t in (("up", up), ("down", down))}
    assert sum(option.nbytes for option in found.values()) <= 60
    assert abs(gone["up"] + gone["down"]) <= 3
    # all of one sign: what hurts least goes first, each target from its smallest component on
    cheap, dear = target("cheap", (0.1, 0.1, 0.1, 0.1, 0.1), 4), target("dear", (9.0, 9.0, 9.0, 9.0, 9.0), 4)
    found = rule.share([cheap, dear], 70, rule.settings())
    assert found["dear"].choice.dense and found["cheap"].choice.rank == 2


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"allocation": "zerosum"}, "Did you mean 'zero-sum'?"),
        ({"allocation": "zero-sum"}, "set gradients.labels to data"),
        ({"allocation": "effective-rank", "allocation_settings": {"qk_tov": 0}}, "Did you mean 'qk_to_v'?"),
        ({"allocation": "importance", "recipe": "rtn"}, "rtn stores something else"),
        ({"allocation": "zero-sum", "recipe": "lord", "gradients.labels": "data"}, "lord stores something else"),
        ({"allocation": "fisher"}, "use kl or kfac"),
        ({"limits": {"*": {"min": 0.5, "max": 0.4}}}, "min 0.5 is above max 0.4"),
        ({"limits": {"*": {"rank": 4, "max": 0.4}}}, "a rank fixes the size"),
        ({"limits": {"*": {}}}, "give min, max or rank"),
        ({"limits": {"*": {"mn": 0.4}}}, "unknown key"),
    ],
)
def test_what_a_rule_cannot_serve_is_refused_with_the_reason(overrides, said):
    assert said in told(**overrides)


@pytest.mark.parametrize("allocation", ["uniform", "kl", "effective-rank"])
def test_limits_hold_on_the_real_path(allocation, tiny_checkpoints, tiny_text_file, tmp_path):
    limits = {"*.down_proj": {"min": 0.8}, "*.q_proj": {"max": 0.4}, "*.layers.-1.mlp.up_proj": {"rank": 0.25}}
    plan = compress(
        tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, ratio=0.3, allocation=allocation, limits=limits
    )
    verify(tmp_path / "out")
    assert plan.ratio >= 0.3
    for step in plan.steps:
        share = step.bytes_after / step.bytes_before
        if step.target.role.endswith("down_proj"):
            assert share >= 0.8
        if step.target.role.endswith("q_proj"):
            assert share <= 0.4
        if step.target.name == "model.layers.2.mlp.up_proj":
            assert step.choice.rank == 12


@pytest.mark.parametrize("allocation", ["uniform", "kl"])
def test_limits_hold_for_members_of_sets(allocation, tiny_checkpoints, tiny_text_file, tmp_path):
    """A feed-forward that loses channels keeps to the limits of each of its matrices."""
    limits = {"*.down_proj": {"min": 0.55}, "*.gate_proj": {"max": 0.8}, "*.layers.-1.self_attn.q_proj": {"rank": 7}}
    limits |= {"*.0.mlp.up_proj": {"min": 0.75}, "*.1.mlp.down_proj": {"min": 1}}  # the feed-forward of layer 1 is no set then
    plan = compress(
        tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "nystrom", ratio=0.2, allocation=allocation, limits=limits
    )
    verify(tmp_path / "out")
    counted = [step for step in plan.steps if allocation == "kl" or not step.kept]
    # a uniform ratio is that of what is not kept
    assert sum(step.bytes_after for step in counted) <= 0.8 * sum(step.bytes_before for step in counted)
    kept = {step.target.name: step.bytes_after / step.bytes_before for step in plan.steps}
    for name, share in kept.items():
        if ".1.mlp" in name:
            assert share <= 0.8 if name.endswith("gate_proj") else share == 1 or name.endswith("up_proj")
        elif name.endswith("gate_proj"):
            assert 0.55 <= share <= 0.8 and share == kept[name.replace("gate", "up")] == kept[name.replace("gate", "down")]
    assert kept["model.layers.0.mlp.up_proj"] >= 0.75
    assert next(step.choice.rank for step in plan.steps if step.target.name == "model.layers.2.self_attn.q_proj") == 7


def test_limits_that_one_set_cannot_meet_name_its_members(tiny_checkpoints, tiny_text_file, tmp_path):
    limits = {"*.gate_proj": {"max": 0.4}, "*.down_proj": {"min": 0.6}}
    with pytest.raises(BudgetError, match=r"gate_proj and model.layers.0.mlp.down_proj are solved together"):
        compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "nystrom", ratio=0.3, limits=limits)


@pytest.mark.parametrize(
    ("limits", "error", "said"),
    [
        ({"*.down_prj": {"min": 0.5}}, RecipeError, "matches no target. Did you mean '*.down_proj'?"),
        ({"*": {"min": 0.6}, "*.q_proj": {"max": 0.4}}, RecipeError, "keeps at least 0.6 by '*' and at most 0.4"),
        ({"*": {"rank": 4}, "*.q_proj": {"rank": 5}}, RecipeError, "rank 4, '*.q_proj' rank 5"),
        ({"*": {"min": 0.9}}, BudgetError, "with these limits they take"),
        ({"*.q_proj": {"rank": 40}}, BudgetError, "its ranks go from 1 to"),
    ],
)
def test_limits_that_cannot_be_are_refused_with_the_numbers(limits, error, said, tiny_checkpoints, tiny_text_file, tmp_path):
    with pytest.raises(error) as caught:
        compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, ratio=0.3, limits=limits)
    assert said in str(caught.value)


def test_without_a_budget_only_what_limits_say_is_compressed(tiny_checkpoints, tiny_text_file, tmp_path):
    plan = compress(
        tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "svd", limits={"*.layers.-1.mlp.up_proj": {"rank": 5}}
    )
    assert [(s.target.name, s.choice.rank) for s in plan.steps if not s.choice.dense] == [("model.layers.2.mlp.up_proj", 5)]


@pytest.mark.parametrize(
    "recipe", ["lems", {"limits": {"*": {"min": 0.3}}}, {"limits": {"*": {"rank": 4}}, "allocation": "kl"}]
)
def test_limits_that_do_not_say_how_much_ask_for_a_size_before_any_work(recipe, tiny_checkpoints):
    """Floors alone leave all whole, and a rule has nothing to share out."""
    loaded = load_recipe(recipe) if isinstance(recipe, str) else load_recipe("svd-llm", recipe)
    view = ModelView(locate(str(tiny_checkpoints("llama"))))
    with pytest.raises(BudgetError, match="How much should go") as asked:
        make_draft(view, loaded)
    assert "--ratio 0.2" in str(asked.value)
    jobs, _ = planned_jobs(view, {"it": loaded}, [0.2, 0.4])
    assert [job.ratio for job in jobs] == [0.2, 0.4]


@pytest.mark.parametrize("recipe", ["svd-llm-v2", "asvd-strs", "zero-sum", "lems", "d-rank", "swift", "laser"])
def test_the_published_recipes_run(recipe, tiny_checkpoints, tiny_text_file, tmp_path):
    ratio = {} if recipe == "laser" else {"ratio": 0.35}
    plan = compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, recipe, **ratio)
    verify(tmp_path / "out")
    if recipe == "laser":
        assert [step.target.name for step in plan.steps if not step.choice.dense] == ["model.layers.1.mlp.up_proj"]
    else:
        assert plan.ratio >= 0.35
