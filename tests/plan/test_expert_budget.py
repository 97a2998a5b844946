"""Budgets over the experts of a mixture: how often a token reaches each, and those that none reaches."""

from __future__ import annotations

import shutil
from collections import defaultdict

import pytest
import torch
from pipeline import compress
from safetensors.torch import load_file, save_file

from lrc.calibrate.collect import collect, targets_by_layer
from lrc.calibrate.data import load_calibration
from lrc.checkpoint.artifact import Artifact
from lrc.checkpoint.location import locate
from lrc.model.layer_forms import target_weight
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.run.losses.curves import measure
from lrc.run.run import Run
from lrc.run.verify import verify


@pytest.fixture
def one_expert_in_two(tiny_checkpoints, tmp_path):
    """A mixture whose router knows two of its four experts."""
    folder = shutil.copytree(tiny_checkpoints("mixtral", num_experts_per_tok=1), tmp_path / "model")
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith(".gate.weight"):
                first = tensors[name][0]
                tensors[name] = torch.stack([first, -first, torch.zeros_like(first), torch.zeros_like(first)])
        save_file(tensors, shard, {"format": "pt"})
    return folder


@pytest.mark.parametrize(("recipe", "allocation"), [("svd-llm", "kl"), ("svd-llm", "spectrum"), ("nystrom", "kl")])
def test_experts_that_no_token_reached_are_weighed_as_the_others(
    recipe, allocation, one_expert_in_two, tiny_text_file, tmp_path
):
    """By themselves, and as a feed-forward of which one matrix alone has statistics."""
    plan = compress(one_expert_in_two, tmp_path / "out", tiny_text_file, recipe, ratio=0.3, allocation=allocation)
    verify(tmp_path / "out")
    by_role = defaultdict(dict)
    for step in plan.steps:
        if step.target.expert is not None:
            by_role[step.target.layer, step.target.role][step.target.expert] = step.bytes_after
    assert any(sizes[0] != sizes[1] for sizes in by_role.values())
    for sizes in by_role.values():
        assert min(sizes[0], sizes[1]) <= sizes[2] == sizes[3] <= max(sizes[0], sizes[1])


def test_experts_that_no_token_reached_stay_whole_where_the_method_chooses(one_expert_in_two, tiny_text_file, tmp_path):
    plan = compress(one_expert_in_two, tmp_path / "out", tiny_text_file, "energy")
    verify(tmp_path / "out")
    experts = [step for step in plan.steps if step.target.expert is not None]
    assert all(step.bytes_after == step.bytes_before for step in experts if step.target.expert > 1)
    assert any(step.bytes_after < step.bytes_before for step in experts if step.target.expert < 2)


def test_in_nats_an_expert_counts_as_often_as_a_token_reaches_it(one_expert_in_two, tiny_text_file, tmp_path):
    cpu = torch.device("cpu")
    given = {"calibration.source": f"text:{tiny_text_file}", "calibration.samples": 8, "calibration.length": 48}
    recipe = load_recipe("kfac", given | {"allocation": "fisher", "ratio": 0.3})
    method, settings = recipe.compression
    view = ModelView(locate(str(one_expert_in_two)))
    calibration = load_calibration(recipe.calibration, view.location.tokenizer())
    draft = make_draft(view, recipe)
    store = collect(view, calibration, draft.needs, tmp_path / "statistics", [cpu], recipe.gradients)
    with Artifact(tmp_path / "out", {}) as artifact:
        curves = measure(draft, Run(view, calibration, artifact), store)
    reached = defaultdict(int)
    for name, targets in zip(view.layer_names, targets_by_layer(view), strict=True):
        layer = view.load(name)
        for target in (target for target in targets if target.expert is not None):
            stats = store.read(name, [target.name])[target.name]
            alone = method.solve(target_weight(layer, name, target)[0], stats, settings)
            share = stats.group.tokens / calibration.tokens.numel()
            reached[target.layer, target.role] += stats.group.tokens
            assert curves[target.name].total == pytest.approx(share * alone.total)
            assert curves[target.name].losses[0] == pytest.approx(share * alone.loss(curves[target.name].options[0].choice))
    assert set(reached.values()) == {calibration.tokens.numel()}
