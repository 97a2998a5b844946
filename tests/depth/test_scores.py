"""Dropping layers: scores against independent formulations, and plain checkpoints that need no lrc."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pipeline import compress as run_pipeline
from shallow import compress, without
from stock import logits_without_lrc
from transformers import AutoModelForCausalLM

from lrc.checkpoint.location import locate
from lrc.depth.base import scores
from lrc.depth.cost import seen_samples
from lrc.depth.scores.block_influence import influences
from lrc.depth.scores.linearity import linearity
from lrc.errors import BudgetError, RecipeError
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.run.verify import verify

FAMILIES = ["llama", "gemma3_text", "gpt2", "opt", "mixtral", "gpt_neox"]
IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_the_original_without_those_layers_and_needs_no_lrc(family, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints(family)
    overrides = {"depth.drop": 1, "depth.protect_first": 0, "depth.protect_last": 0}
    plan, _ = compress(model, tmp_path / "out", tiny_text_file, **overrides)
    assert len(plan.dropped) == 1 and plan.targets_after < plan.targets_before
    assert "import lrc" not in (tmp_path / "out" / "README.md").read_text()
    verify(tmp_path / "out")
    expected = without(AutoModelForCausalLM.from_pretrained(model), plan.dropped)(IDS, use_cache=False).logits
    done = logits_without_lrc(tmp_path / "out", tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


def test_what_stays_is_compressed_on_the_inputs_that_it_will_see(tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama")
    plan, _ = compress(model, tmp_path / "out", tiny_text_file, "prune+svd", ratio=0.5, **{"depth.ratio": 0.3})
    assert len(plan.dropped) == 1
    assert 0.5 <= plan.ratio < 0.55, "both steps together meet the ratio"
    record = json.loads((tmp_path / "out" / "lrc.json").read_text())
    assert record["dropped_layers"] == list(plan.dropped)
    # the same compression of a model that never had the layer
    compress(model, tmp_path / "shallow", tiny_text_file, **{"depth.drop": 1})
    stay = sum(step.bytes_before for step in plan.steps if step.target.layer not in plan.dropped)
    left = 1 - 0.5 * plan.targets_before / stay
    run_pipeline(tmp_path / "shallow", tmp_path / "twice", tiny_text_file, samples=8, length=32, ratio=left)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(IDS).logits for name in ("out", "twice"))
    assert torch.allclose(one, two, atol=1e-4)


def _boundaries(layers=6, samples=3, length=40, width=8):
    chance = np.random.default_rng(0)
    states = [chance.standard_normal((samples, length, width))]
    for layer in range(layers):
        turn = np.linalg.qr(np.eye(width) + 0.1 * (layer + 1) * chance.standard_normal((width, width)))[0]
        states.append(states[-1] @ turn + 0.05 * layer * chance.standard_normal(states[-1].shape))
    return states


def test_block_influence_and_linearity_against_numpy():
    states = _boundaries()
    tensors = [torch.tensor(state) for state in states]
    for layer, found in enumerate(influences(tensors)):
        x, y = states[layer].reshape(-1, 8), states[layer + 1].reshape(-1, 8)
        cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert found == pytest.approx(1 - cosine.mean(), rel=1e-9)
        x, y = (z - z.mean(0) for z in (x, y))
        x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
        basis = np.linalg.svd(x, full_matrices=False)[0]
        assert linearity(tensors[layer], tensors[layer + 1]) == pytest.approx(
            1 - np.linalg.norm(y - basis @ basis.T @ y) ** 2, rel=1e-9
        )


@pytest.mark.parametrize("name", sorted(scores()))
def test_a_score_drops_as_many_candidates_as_it_is_asked_to(name):
    score = scores()[name]
    if score.tries:
        chosen = score.choose(lambda sets: [float(max(each)) for each in sets], range(1, 5), lambda gone: len(gone) >= 2)
    else:
        chosen = score.choose([torch.tensor(state) for state in _boundaries()], range(1, 5), 2)
    assert len(chosen) == 2 and chosen == sorted(chosen) and set(chosen) <= {1, 2, 3, 4}


def test_angular_takes_the_run_that_turns_the_last_token_least():
    states = [torch.zeros(2, 3, 4) for _ in range(7)]
    angles = [0.0, 0.5, 0.6, 0.65, 1.2, 1.9, 2.5]
    for state, angle in zip(states, angles, strict=True):
        state[:, -1, 0], state[:, -1, 1] = np.cos(angle), np.sin(angle)
        state[:, :-1] = torch.randn(2, 2, 4)
    assert scores()["angular"].choose(states, range(6), 2) == [1, 2]


def test_angular_of_all_tokens_is_not_misled_by_the_last_one():
    states = [torch.zeros(2, 5, 4) for _ in range(7)]
    for state, angle, last in zip(
        states, [0.0, 0.9, 1.5, 1.6, 1.7, 2.3, 3.0], [0.0, 0.1, 0.2, 0.9, 1.8, 2.4, 3.1], strict=True
    ):
        state[..., 0], state[..., 1] = np.cos(angle), np.sin(angle)
        state[:, -1, 0], state[:, -1, 1] = np.cos(last), np.sin(last)
    assert scores()["angular"].choose(states, range(6), 2) == [0, 1]
    assert scores()["angular-all"].choose(states, range(6), 2) == [2, 3]


def test_linearity_refuses_too_few_tokens(tiny_checkpoints, tiny_text_file, tmp_path):
    with pytest.raises(Exception, match="needs 96 tokens"):
        compress(
            tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file,
            **{"depth.score": "linearity", "depth.drop": 1, "calibration.samples": 2},
        )  # fmt: skip


def test_a_score_that_needs_more_tokens_for_a_wider_model_gets_them(tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    wide, usual = scores()["linearity"], scores()["angular"]
    assert [seen_samples(wide, 8192, 256, length) for length in (2048, 1500, 20_000)] == [8, 11, 1]
    assert [seen_samples(usual, 8192, 256, length) for length in (2048, 1500, 20_000)] == [4, 5, 1]
    assert seen_samples(wide, 8192, 3, 2048) == 3, "no more than there are"
    monkeypatch.setattr("lrc.depth.cost._SEEN_TOKENS", 32)  # fewer than twice the width of the tiny model
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, **{"depth.score": "linearity", "depth.drop": 1})


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"depth.score": "block-influense"}, RecipeError, "Did you mean 'block-influence'"),
        ({"depth.drop": 9}, BudgetError, "9 of 3 layers shall go, and 1 are not protected"),
        ({}, BudgetError, "How many layers should go"),
        ({"depth.drop": 1, "depth.ratio": 0.3}, RecipeError, "not both"),
        ({"depth.drop": 1, "allocation": "kl"}, RecipeError, "allocation: uniform"),
    ],
)
def test_mistakes_are_named(overrides, error, message, tiny_checkpoints):
    with pytest.raises(error, match=message):
        make_draft(ModelView(locate(str(tiny_checkpoints("llama")))), load_recipe("block-influence", overrides))
