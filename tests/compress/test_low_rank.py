"""The affine and the two-sided method against independent formulations in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import compress
from transformers import AutoModelForCausalLM

from lrc.compress.base import GroupStats, TargetStats, get_method
from lrc.compress.options import Choice, Shape, low_rank_options
from lrc.run.verify import verify

SHAPES = [(24, 16), (16, 24), (20, 20), (1, 12), (12, 1)]


def problem(out_features, in_features, tokens=200, seed=0, shift=2.0):
    chance = np.random.default_rng(seed)
    weight = chance.standard_normal((out_features, in_features))
    scales = np.logspace(-1, 1, in_features)
    x = (chance.standard_normal((tokens, in_features)) + shift) @ (chance.standard_normal((in_features,) * 2) * scales)
    return weight, x


def statistics(weight, x, side="gram", gradients=None):
    gram = torch.tensor(x.T @ x / len(x))
    wide = torch.tensor(weight)
    group = GroupStats(len(x), gram if side == "gram" else None, torch.tensor(x.mean(0)))
    grad_gram = None if gradients is None else torch.tensor(gradients.T @ gradients / len(gradients))
    return TargetStats(group, None if side == "gram" else wide @ gram @ wide.T, grad_gram)


def solve(name, weight, stats, **chosen):
    picked = get_method(name)
    return picked.solve(torch.tensor(weight), stats, picked.settings(**chosen))


def affine_error(form, weight, x):
    y = x @ weight.T
    found = x @ form.dense().numpy().T + (0 if form.bias is None else form.bias.numpy())
    return float(((y - found) ** 2).sum(1).mean())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["gram", "output gram"])
def test_lord_is_the_optimal_affine_map(shape, side):
    weight, x = problem(*shape)
    solution = solve("lord", weight, statistics(weight, x, side))
    y = x @ weight.T
    values = np.linalg.svd((y - y.mean(0)) / np.sqrt(len(y)), compute_uv=False) ** 2  # principal components of the outputs
    for rank in range(1, min(shape) + 1):
        measured = affine_error(solution.form(Choice(rank)), weight, x)
        assert measured == pytest.approx(values[rank:].sum(), rel=1e-6, abs=1e-8 * values.sum())
        assert solution.loss(Choice(rank)) == pytest.approx(measured, rel=1e-6, abs=1e-8 * values.sum())


def test_lord_beats_svd_llm_on_inputs_that_calibration_did_not_see():
    weight, both = problem(24, 16, tokens=80_000)
    x, held_out = both[:40_000], both[40_000:]
    stats = statistics(weight, x)
    for rank in range(1, 16):
        affine = affine_error(solve("lord", weight, stats).form(Choice(rank)), weight, held_out)
        linear = affine_error(solve("svd-llm", weight, stats).form(Choice(rank)), weight, held_out)
        assert affine <= linear * (1 + 1e-3)
    assert affine_error(solve("lord", weight, stats).form(Choice(3)), weight, held_out) < 0.99 * affine_error(
        solve("svd-llm", weight, stats).form(Choice(3)), weight, held_out
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_lord_without_centring_is_svd_llm(shape):
    weight, x = problem(*shape)
    stats = statistics(weight, x)
    for rank in range(1, min(shape) + 1):
        one = solve("lord", weight, stats, centre=False).form(Choice(rank))
        two = solve("svd-llm", weight, stats).form(Choice(rank))
        assert one.bias is None
        assert torch.allclose(one.dense(), two.dense(), rtol=1e-6, atol=1e-6 * float(two.dense().abs().max()))


def test_a_new_bias_is_paid_for():
    lord = get_method("lord")
    plain = low_rank_options(Shape(24, 16, 2), None)
    without = lord.options(Shape(24, 16, 2), lord.settings(), 1)
    assert [option.nbytes for option in without] == [option.nbytes + 48 for option in plain][: len(without)]
    assert lord.options(Shape(24, 16, 2, bias=True), lord.settings(), 1) == plain


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_lord_through_the_pipeline(family, tiny_checkpoints, tiny_text_file, tmp_path):
    plan = compress(tiny_checkpoints(family), tmp_path / "out", tiny_text_file, "lord", ratio=0.3)
    assert plan.targets_after <= 0.7 * plan.targets_before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(name.endswith(".bias") for name in model.state_dict())
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_kfac_minimises_the_two_sided_metric(shape):
    weight, x = problem(*shape)
    gradients, _ = problem(200, shape[0], seed=1)
    stats = statistics(weight, x, gradients=gradients)
    solution = solve("kfac", weight, stats, shrink_grad=0.1)
    c, g = stats.group.gram.numpy(), stats.grad_gram.numpy()
    g = 0.9 * g + 0.1 * np.trace(g) / len(g) * np.eye(len(g))
    left, right = np.linalg.cholesky(g), np.linalg.cholesky(c + 1e-12 * np.trace(c) * np.eye(len(c)))
    values = np.linalg.svd(left.T @ weight @ right, compute_uv=False) ** 2  # the paper's route: whitening by Cholesky factors
    for rank in range(1, min(shape) + 1):
        error = weight - solution.form(Choice(rank)).dense().numpy()
        measured = np.trace(error.T @ g @ error @ c)
        assert measured == pytest.approx(np.linalg.norm(left.T @ error @ right) ** 2, rel=1e-6, abs=1e-7 * values.sum())
        assert measured == pytest.approx(values[rank:].sum(), rel=1e-5, abs=1e-7 * values.sum())
        assert solution.loss(Choice(rank)) == pytest.approx(measured / 2, rel=1e-5, abs=1e-7 * values.sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.integers(1, 30))
def test_kfac_takes_singular_grams_on_both_sides(out_features, in_features, tokens, backward):
    weight, x = problem(out_features, in_features, tokens)
    gradients, _ = problem(backward, out_features, seed=1)
    solution = solve("kfac", weight, statistics(weight, x, gradients=gradients))
    full = min(out_features, in_features)
    losses = [solution.loss(Choice(rank)) for rank in range(full + 1)]
    assert all(a >= b - 1e-9 * losses[0] for a, b in pairwise(losses))
    dense = solution.form(Choice(full)).dense()
    assert torch.allclose(dense, torch.tensor(weight), atol=1e-5 * float(np.abs(weight).max()))


def test_kfac_says_what_it_lacks():
    weight, x = problem(6, 5)
    with pytest.raises(ValueError, match="output gradients"):
        solve("kfac", weight, statistics(weight, x))


@pytest.mark.parametrize("shape", SHAPES)
def test_fwsvd_against_the_papers_formula(shape):
    """Rows of the paper are input channels: Î W with Î the roots of the rows' Fisher information, then Î is divided out."""
    weight, x = problem(*shape)
    fisher = np.random.default_rng(2).random(shape[1]) + 0.1
    solution = solve("fwsvd", weight, TargetStats(GroupStats(len(x)), fisher_in=torch.tensor(fisher)))
    root = np.diag(np.sqrt(fisher))
    left, values, right = np.linalg.svd(root @ weight.T, full_matrices=False)
    for rank in range(1, min(shape) + 1):
        expected = (np.linalg.inv(root) @ (left[:, :rank] * values[:rank]) @ right[:rank]).T
        assert np.allclose(solution.form(Choice(rank)).dense().numpy(), expected, atol=1e-9 * np.abs(weight).max())
        assert solution.loss(Choice(rank)) == pytest.approx((values[rank:] ** 2).sum(), rel=1e-9, abs=1e-12 * values[0] ** 2)


def test_fwsvd_takes_channels_without_gradient():
    weight, x = problem(9, 7)
    for fisher in (torch.zeros(7), torch.tensor([0.0, 1, 2, 0, 3, 4, 5])):
        solution = solve("fwsvd", weight, TargetStats(GroupStats(len(x)), fisher_in=fisher))
        assert np.allclose(solution.form(Choice(7)).dense().numpy(), weight)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
def test_welore_keeps_what_reaches_the_threshold(threshold):
    weight, x = problem(30, 40)
    values = np.linalg.svd(weight, compute_uv=False)
    wanted = int(((values - values[-1]) / (values[0] - values[-1]) >= threshold).sum())
    preferred = solve("welore", weight, TargetStats(GroupStats(len(x))), threshold=threshold).preferred
    assert preferred == (Choice(wanted) if wanted * 70 < 1200 else Choice())
    flat = solve("welore", np.eye(12), TargetStats(GroupStats(1)), threshold=0.9)
    assert flat.preferred.dense, "equal singular values are not low rank"


@pytest.mark.parametrize("keep", [0.9, 0.999])
@pytest.mark.parametrize("narrow", ["inputs", "outputs"])
def test_utilized_rank_is_that_of_the_narrower_subspace(keep, narrow):
    """Inputs in 5 dimensions, or outputs in 5 (a weight of rank 5); the numbers against NumPy."""
    chance = np.random.default_rng(2)
    weight, x = chance.standard_normal((40, 30)), chance.standard_normal((500, 30)) + 1
    if narrow == "inputs":
        x = x[:, :5] @ chance.standard_normal((5, 30))
    else:
        weight = weight[:, :5] @ chance.standard_normal((5, 30))
    stats = statistics(weight, x)
    solution = solve("utilized-rank", weight, stats, keep=keep, multiple=1)

    def needed(energy):
        parts = np.cumsum(np.sort(energy)[::-1]) / energy.sum()
        return int(np.argmax(parts >= keep - 1e-12)) + 1

    sizes = [needed(np.linalg.svd(y, compute_uv=False) ** 2) for y in (x, x @ weight.T)]
    assert [solution.inputs, solution.outputs] == sizes
    assert solution.preferred.rank == min(sizes) <= 5
    best = np.linalg.svd((x @ weight.T) / np.sqrt(len(x)), compute_uv=False) ** 2
    rank = min(sizes)
    assert affine_error(solution.form(Choice(rank)), weight, x) == pytest.approx(best[rank:].sum(), abs=1e-8 * best.sum())
    wide = solve("utilized-rank", weight, stats, keep=keep, multiple=16)
    assert wide.preferred.rank == 16  # rounded up; factors of rank 17 are still smaller than a 40 x 30 matrix


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99, 1.0])
def test_energy_keeps_its_part_of_the_variance_and_no_more_than_that(keep):
    weight, x = problem(60, 40)
    outputs = x @ weight.T
    variances = np.linalg.eigvalsh(np.cov(outputs.T, bias=True))[::-1]
    held = np.cumsum(variances) / variances.sum()
    rank = int(np.searchsorted(held, keep - 1e-12)) + 1
    rounded = -(-rank // 4) * 4
    preferred = solve("energy", weight, statistics(weight, x), keep=keep, multiple=4).preferred
    assert preferred == (Choice(rounded) if rounded * 100 < 2400 else Choice())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("fwsvd", {"ratio": 0.3}),
        ("welore", {"settings.threshold": 0.5}),
        ("energy", {"settings.keep": 0.8, "settings.multiple": 2}),
        ("utilized-rank", {"settings.keep": 0.9, "settings.multiple": 2}),
    ],
)
def test_sizes_of_the_methods_own_and_of_the_budget_through_the_pipeline(
    family, recipe, overrides, tiny_checkpoints, tiny_text_file, tmp_path
):
    chosen = {key.replace(".", "__"): value for key, value in overrides.items()}
    plan = compress(tiny_checkpoints(family), tmp_path / "out", tiny_text_file, recipe, **chosen)
    assert 0 < plan.targets_after < plan.targets_before
    record = verify(tmp_path / "out")
    assert record["bytes"]["targets_after"] == plan.targets_after
    assert any(target["error"] and target["error"] > 0 for target in record["targets"])
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(8)[None]).logits).all()


def test_a_rank_of_the_methods_own_is_rounded_up_to_an_option(tiny_checkpoints, tiny_text_file, tmp_path):
    """Dense would hold what was asked for too, and save nothing."""
    model, wish = tiny_checkpoints("llama"), {"settings__keep": 0.8, "settings__multiple": 1}
    plain = compress(model, tmp_path / "plain", tiny_text_file, "energy", **wish)
    found = compress(model, tmp_path / "out", tiny_text_file, "energy", rank_multiple=8, **wish)
    ranks = [(before.choice.rank, after.choice.rank) for before, after in zip(plain.steps, found.steps, strict=True)]
    assert all(before is not None and after == -(-before // 8) * 8 for before, after in ranks)
    assert any(before % 8 for before, _ in ranks)
