"""Methods that solve several targets together, against independent float64 formulations."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from lrc.compress.base import GroupStats, TargetStats, get_method
from lrc.compress.chain import ChainSettings, chain
from lrc.compress.channels.feed_forward import feed_forwards
from lrc.compress.channels.nystrom import Reading
from lrc.compress.forms import experts
from lrc.compress.forms.base import build_module, fill_module
from lrc.compress.low_rank.stacked import stack_statistics
from lrc.compress.mixture import MixtureSettings, mixture
from lrc.compress.options import Choice, JointOption, Shape
from lrc.errors import LrcError
from lrc.model.targets import Target

# rows of the members, width of their input, tokens: tall, wide, a member of one row, an exactly singular gram
UNITS = [((12, 7, 7), 10, 200), ((3, 4), 20, 200), ((1, 9), 6, 200), ((8, 8), 16, 5)]


def problem(rows, width, tokens, inputs=1, seed=0):
    """Weights, and the activations that each reads: one for all, or one each."""
    chance = np.random.default_rng(seed)
    weights = [chance.standard_normal((n, width)) for n in rows]
    x = [chance.standard_normal((tokens, width)) * np.logspace(-1, 1, width) @ chance.standard_normal((width, width))
         for _ in range(inputs)]  # fmt: skip
    return weights, x


def statistics(x, count):
    """Statistics of `count` targets; they share one group where there is one input."""
    groups = [GroupStats(len(each), torch.tensor(each.T @ each / len(each)),
                         mean_square=torch.tensor((each**2).mean(0))) for each in x]  # fmt: skip
    return [TargetStats(groups[number if len(groups) > 1 else 0]) for number in range(count)]


def solve(name, weights, x, slots=None, grad_gram=None, **settings):
    picked = get_method(name)
    wanted = picked.settings(**settings)
    tensors = [torch.tensor(weight) for weight in weights]
    told = statistics(x, len(weights))
    if grad_gram is not None:
        told[-1] = replace(told[-1], grad_gram=torch.tensor(grad_gram))
    return picked.joint.solve(tensors, told, slots or [""] * len(weights), wanted)


def measured(weight, form, gram):
    error = weight - form.dense().numpy()
    return float(np.trace(error @ gram @ error.T))


@pytest.mark.parametrize(("rows", "width", "tokens"), UNITS)
@pytest.mark.parametrize("name", ["shared-input", "basis-sharing"])
def test_a_shared_factor_is_the_optimum_of_the_stack(name, rows, width, tokens):
    """Against NumPy's SVD of the stacked weights times the root of the metric."""
    inputs = 1 if name == "shared-input" else len(rows)
    weights, x = problem(rows, width, tokens, inputs)
    gram = np.mean([each.T @ each / len(each) for each in x], axis=0)
    values, vectors = np.linalg.eigh(gram)
    stacked = np.concatenate(weights)
    energy = np.linalg.svd(stacked @ vectors * np.sqrt(values.clip(0)), compute_uv=False) ** 2
    members = solve(name, weights, x)
    assert sum(member.total for member in members) == pytest.approx(energy.sum(), rel=1e-9)
    for rank in range(1, min(stacked.shape) + 1):
        forms = [member.form(Choice(rank=rank)) for member in members]
        each = [measured(weight, form, gram) for weight, form in zip(weights, forms, strict=True)]
        assert sum(each) == pytest.approx(energy[rank:].sum(), rel=1e-6, abs=1e-8 * energy.sum())
        told = [member.loss(Choice(rank=rank)) for member in members]
        assert told == pytest.approx(each, rel=1e-6, abs=1e-8 * energy.sum())
        assert [form.lends for form in forms] == [True] + [False] * (len(rows) - 1)
        assert all(torch.equal(form.right, forms[0].right) for form in forms)


def test_the_metric_of_neighbours_is_that_of_all_their_tokens():
    """The mean of two grams over equally many tokens is the gram of both layers' tokens together."""
    weights, x = problem((6, 9), 8, 50, inputs=2)
    both = np.concatenate(x)
    apart = solve("basis-sharing", weights, x)
    together = solve("shared-input", weights, [both])
    for rank in (1, 4, 7):
        for one, other in zip(apart, together, strict=True):
            assert one.loss(Choice(rank=rank)) == pytest.approx(other.loss(Choice(rank=rank)), rel=1e-9)


def options(name, shapes, slots=None, multiple=1, **settings):
    picked = get_method(name)
    return picked.joint.options(shapes, slots or [""] * len(shapes), picked.settings(**settings), multiple)


@pytest.mark.parametrize("name", ["shared-input", "basis-sharing"])
def test_ranks_are_those_of_the_published_formula(name):
    """rank = ⌊kept · g · m · n / (m + g · n)⌋: 2457 for q, k, v of width 4096 at 0.8, where each alone has 1638."""
    found = options(name, [Shape(4096, 4096, 2)] * 3)
    fitting = [option for option in found if option.nbytes <= 0.8 * 3 * 4096 * 4096 * 2]
    assert fitting[-1].choice.rank == int(0.8 * 3 * 4096 * 4096 / (4096 + 3 * 4096)) == 2457
    grouped = [option for option in options(name, [Shape(1024, 4096, 2)] * 2) if option.nbytes <= 0.8 * 2 * 1024 * 4096 * 2]
    assert grouped[-1].choice.rank == 1092
    assert all(option.choice.rank % 64 == 0 for option in options(name, [Shape(512, 512, 2)] * 2, multiple=64))


SLOTS = {
    "shared-input": (["", "", ""], [Shape(40, 24, 2), Shape(8, 24, 2, bias=True), Shape(16, 24, 2)]),
    "basis-sharing": (["", ""], [Shape(20, 24, 2), Shape(20, 24, 2)]),
    "cospadi-group": (["", ""], [Shape(20, 24, 2), Shape(13, 24, 2)]),
    "lorap": (["query", "key", "value", "output"], [Shape(32, 24, 2), Shape(16, 24, 2), Shape(16, 24, 2), Shape(24, 32, 2)]),
    "lorap ": (["gate and up", "down"], [Shape(60, 24, 2, bias=True), Shape(24, 30, 2)]),
    "lorap  ": (["up", "up", "down"], [Shape(30, 24, 2), Shape(30, 24, 2), Shape(24, 30, 2)]),
    "nystrom": (["gate and up", "down"], [Shape(60, 24, 2, bias=True), Shape(24, 30, 2)]),
    "nystrom ": (["up", "up", "down"], [Shape(30, 24, 2), Shape(30, 24, 2), Shape(24, 30, 2)]),
}


@pytest.mark.parametrize("case", SLOTS)
def test_options_cost_what_the_forms_weigh_and_losses_fall(case):
    slots, shapes = SLOTS[case]
    name = case.strip()
    chance = np.random.default_rng(1)
    weights = [chance.standard_normal((shape.out_features, shape.in_features)).astype(np.float32) for shape in shapes]
    x = [chance.standard_normal((100, shape.in_features)) for shape in shapes]
    more = {"iterations": 2, "refits": 1} if name == "cospadi-group" else {}
    found = options(name, shapes, slots, **more)
    assert all(a.nbytes < b.nbytes for a, b in pairwise(found))
    losses = []
    for option in found[:: max(1, len(found) // 6)]:
        assert isinstance(option, JointOption)
        assert option.nbytes == sum(member.nbytes for member in option.members) < sum(shape.nbytes for shape in shapes)
        open_members = [i for i, member in enumerate(option.members) if not member.choice.dense]
        solutions = solve(name, [weights[i] for i in open_members], [x[i] for i in open_members],
                          [slots[i] for i in open_members], **more)  # fmt: skip
        losses.append(0.0)
        for solution, i in zip(solutions, open_members, strict=True):
            form = solution.form(option.members[i].choice)
            if shapes[i].bias:  # rows that leave take their bias with them: counted where a bias is smaller than it was
                form = form.with_bias(torch.zeros(shapes[i].out_features))
            form = form.owned_by("somewhere").stored(torch.bfloat16)
            gone = (shapes[i].out_features - len(form.tensors()["bias"])) * 2 if shapes[i].bias else 0
            assert form.nbytes - gone == option.members[i].nbytes
            losses[-1] += solution.loss(option.members[i].choice)
            module = fill_module(build_module(json.loads(json.dumps(form.spec())), *reversed(weights[i].shape)), form.tensors())
            assert module.weight.shape != weights[i].shape  # a reader without lrc stops at the shape
    assert all(a >= b - 1e-9 * losses[0] for a, b in pairwise(losses))


@pytest.mark.parametrize(("rows", "width", "tokens"), UNITS)
def test_a_dictionary_of_several_layers_is_that_of_their_stack(rows, width, tokens):
    weights, x = problem(rows, width, tokens, inputs=len(rows))
    gram = np.mean([each.T @ each / len(each) for each in x], axis=0)
    chosen, more = Choice(atoms=6, nonzeros=2), {"iterations": 4, "refits": 2}
    members = solve("cospadi-group", weights, x, **more)
    forms = [member.form(chosen) for member in members]
    alone = get_method("cospadi")
    # the same digits of the same metric (checked below): pursuit chooses, and would amplify another rounding
    stacked = torch.tensor(np.concatenate(weights))
    stack = alone.solve(stacked, stack_statistics(statistics(x, len(rows))), alone.settings(**more))
    expected = stack.form(chosen).dense()
    assert torch.allclose(torch.cat([form.dense() for form in forms]), expected, atol=1e-9 * float(expected.abs().max()))
    for member, form, weight in zip(members, forms, weights, strict=True):
        assert member.loss(chosen) == pytest.approx(measured(weight, form, gram), rel=1e-6, abs=1e-8 * member.total)
        assert member.total == pytest.approx(np.trace(weight @ gram @ weight.T), rel=1e-8)
        assert len(form.own.values) == 2 * len(weight)  # exactly two atoms per row
        assert torch.equal(form.own.atoms, forms[0].own.atoms)


def test_attention_by_weighted_svd_against_numpy():
    weights, x = problem((14, 6), 10, 80)
    scale = np.sqrt((x[0] ** 2).mean(0))
    for solution, weight in zip(solve("lorap", weights, x, ["query", "value"]), weights, strict=True):
        left, values, right = np.linalg.svd(weight * scale, full_matrices=False)
        for rank in (1, 3, 6):
            assert np.allclose(
                solution.form(Choice(rank=rank)).dense(), (left[:, :rank] * values[:rank]) @ right[:rank] / scale
            )
            assert solution.loss(Choice(rank=rank)) == pytest.approx((values[rank:] ** 2).sum(), abs=1e-9)


def test_values_and_output_keep_three_times_as_much():
    """Grouped-query attention of Llama-3-8B's shapes at 0.4; and the multi-head one of the paper, whose budget is 3 : 1."""
    shapes = [Shape(4096, 4096, 2), Shape(1024, 4096, 2), Shape(1024, 4096, 2), Shape(4096, 4096, 2)]
    slots = ["query", "key", "value", "output"]
    option = next(option for option in options("lorap", shapes, slots) if option.choice.rank == 400)
    kept = [member.nbytes / shape.nbytes for member, shape in zip(option.members, shapes, strict=True)]
    assert kept == pytest.approx([kept[0], kept[0], 3 * kept[0], 3 * kept[0]], rel=0.01)
    square = [Shape(1000, 1000, 2)] * 4
    fitting = [option for option in options("lorap", square, slots) if option.nbytes <= 0.5 * 4_000_000 * 2][-1]
    assert [member.choice.rank for member in fitting.members] == [125, 125, 375, 375]  # (1 - ρ) h / 4 and three times that
    at_most = [option for option in options("lorap", square, slots) if option.nbytes <= 0.8 * 4_000_000 * 2][-1]
    assert [member.choice.rank for member in at_most.members] == [300, 300, None, None]  # v and o dense where that is no saving


@pytest.mark.parametrize("fused", [False, True])
def test_channels_leave_in_the_papers_order(fused):
    """Importance ‖gate‖ + ‖up‖ + ‖down‖ of |W| √E[x²], ascending; the least important 10 % stay."""
    (gate, up), x = problem((20, 20), 12, 60)
    (down,), h = problem((12,), 20, 60, seed=3)
    scale, inner = np.sqrt((x[0] ** 2).mean(0)), np.sqrt((h[0] ** 2).mean(0))
    importance = sum(np.linalg.norm(w * scale, axis=1) for w in (gate, up)) + np.linalg.norm(down * inner, axis=0)
    ascending = np.argsort(importance)
    weights = [np.concatenate([gate, up]), down] if fused else [gate, up, down]
    slots = ["gate and up", "down"] if fused else ["up", "up", "down"]
    solutions = solve("lorap", weights, [*x, *h] if fused else [*x, *x, *h], slots, protect=0.1)
    for channels in (3, 14, 19):
        gone = ascending[2 : 2 + 20 - channels]
        forms = [solution.form(Choice(channels=channels)) for solution in solutions]
        expected = down.copy()
        expected[:, gone] = 0
        assert np.array_equal(forms[-1].dense().numpy(), expected)
        told = solutions[-1].loss(Choice(channels=channels))
        assert told == pytest.approx(((down - expected) ** 2 * inner**2).sum())
        rows = np.concatenate([form.dense().numpy() for form in forms[:-1]])
        whole = np.concatenate([gate, up])
        whole[np.concatenate([gone, gone + 20])] = 0
        assert np.array_equal(rows, whole)
        bias = torch.arange(len(weights[0]), dtype=torch.float64)
        assert len(forms[0].with_bias(bias).form.bias) == channels * (2 if fused else 1)
        assert not set(gone) & set(forms[0].with_bias(bias).form.bias.int().tolist())
    assert solutions[-1].total == pytest.approx((down**2 * inner**2).sum())


@pytest.mark.parametrize("name", ["nystrom", "nystrom-kfac"])
@pytest.mark.parametrize(("rows", "inner", "tokens"), [(9, 14, 60), (3, 16, 200), (1, 8, 50), (12, 16, 5)])
def test_channels_leave_one_by_one_and_the_rest_is_least_squares(rows, inner, tokens, name):
    """Against trying every channel at every step, each time with NumPy's least squares for what would be left."""
    (down,), (h,) = problem((rows,), inner, tokens)
    gram = h.T @ h / tokens
    ridge = 1e-3 * np.diag(gram)
    grad_gram, root = None, np.eye(rows)
    if name == "nystrom-kfac":  # the loss is half of the squared error in the gradients' metric, less of it taken as told
        gradients = np.random.default_rng(7).standard_normal((4, rows)) * np.logspace(1, -1, rows)
        grad_gram = gradients.T @ gradients / 4
        root = np.linalg.cholesky(0.5 * (0.8 * grad_gram + 0.2 * np.trace(grad_gram) / rows * np.eye(rows)))

    def fit(kept):
        extended = np.concatenate([h / np.sqrt(tokens), np.diag(np.sqrt(ridge))])
        found = np.zeros_like(down)
        found[:, kept] = np.linalg.lstsq(extended[:, kept], extended @ down.T, rcond=None)[0].T
        return found, float(((extended @ (down - found).T @ root) ** 2).sum())

    up = np.random.default_rng(5).standard_normal((inner, 6))
    more = {} if grad_gram is None else {"grad_gram": grad_gram, "shrink_grad": 0.2}
    solutions = solve(name, [up, down], [h, h], ["up", "down"], ridge=1e-3, **more)
    assert solutions[1].total == pytest.approx(fit([])[1], rel=1e-9)
    kept = list(range(inner))
    while len(kept) > 1:
        kept = min(([each for each in kept if each != gone] for gone in kept), key=lambda left: fit(left)[1])
        choice, (expected, loss) = Choice(channels=len(kept)), fit(kept)
        form = solutions[1].form(choice)
        assert form.columns.tolist() == kept
        assert np.allclose(form.dense().numpy(), expected, atol=1e-7 * np.abs(expected).max())
        assert solutions[1].loss(choice) == pytest.approx(loss, rel=1e-7)
        assert np.array_equal(solutions[0].form(choice).form.weight.numpy(), up[kept])
        assert solutions[0].loss(choice) == 0


def test_losses_of_many_channels_are_exact_for_their_order():
    """Blocks leave together where there are many channels; what is told is lost all the same."""
    (down,), (h,) = problem((10,), 150, 400)
    solutions = solve("nystrom", [down.T.copy(), down], [h, h], ["up", "down"], ridge=0.05)
    gram = h.T @ h / len(h)
    gram += 0.05 * np.diag(np.diag(gram))
    for channels in (149, 120, 60, 10, 1):
        choice = Choice(channels=channels)
        assert solutions[1].loss(choice) == pytest.approx(measured(down, solutions[1].form(choice), gram), rel=1e-7)


def test_a_size_is_the_same_whichever_others_were_asked_for_before():
    """Channels leave only as far as somebody asks; who asks for few first, or for one size alone, gets the same ones."""
    (down,), (h,) = problem((10,), 150, 400)
    several = solve("nystrom", [down.T.copy(), down], [h, h], ["up", "down"])[1]
    for choice in (Choice(channels=channels) for channels in (1, 40, 90, 140)):
        alone = solve("nystrom", [down.T.copy(), down], [h, h], ["up", "down"])[1]
        assert several.loss(choice) == alone.loss(choice)
        one, other = several.form(choice), alone.form(choice)
        assert torch.equal(one.columns, other.columns) and torch.equal(one.form.weight, other.form.weight)


def test_alternatives_that_begin_with_the_same_channels_find_them_once(monkeypatch):
    inverted, inverse = [], Reading.inverse
    monkeypatch.setattr(Reading, "inverse", lambda reading: inverted.append(reading.ridge) or inverse(reading))
    nystrom, rounded = get_method("nystrom"), get_method("rtn")
    methods = [nystrom, *(chain(nystrom, rounded) for _ in range(3))]
    steps = [(0.1, 3), (0.1, 4), (0.5, 4)]
    settings = MixtureSettings(
        alternatives=(
            nystrom.settings(),
            *(ChainSettings(first=nystrom.settings(ridge=r), second=rounded.settings(bits=b, group_size=16)) for r, b in steps),
        )
    )
    (down,), (h,) = problem((10,), 48, 400)
    weights, told = [torch.tensor(down.T.copy()), torch.tensor(down)], statistics([h, h], 2)
    solved = mixture(methods).joint.solve(weights, told, ["up", "down"], settings)
    found = [solved[1].form(Choice(channels=32, alternative=number)) for number in range(4)]
    assert inverted == [0.1, 0.5]
    monkeypatch.undo()
    for number, (method, own) in enumerate(zip(methods, settings.alternatives, strict=True)):
        alone = method.joint.solve(weights, statistics([h, h], 2), ["up", "down"], own)[1]
        assert torch.equal(found[number].dense(), alone.form(Choice(channels=32)).dense())
        assert solved[1].loss(Choice(channels=20, alternative=number)) == alone.loss(Choice(channels=20))


def test_a_ridge_below_what_rounding_leaves_says_so():
    (down,), (h,) = problem((4,), 40, 3)
    gram = (h.T @ h).astype(np.float32)
    gram[0, 1] = gram[1, 0] = 1.001 * np.sqrt(gram[0, 0] * gram[1, 1])  # no gram, by more than the ridge
    stats = TargetStats(GroupStats(3, torch.tensor(gram)))
    nystrom = get_method("nystrom")
    with pytest.raises(LrcError, match="Raise settings.ridge"):
        nystrom.joint.solve(
            [torch.tensor(down.T.copy()), torch.tensor(down)], [stats] * 2, ["up", "down"], nystrom.settings(ridge=1e-8)
        )


def test_a_feed_forward_that_saw_nothing_keeps_its_largest_channels():
    chance = np.random.default_rng(2)
    down = chance.standard_normal((4, 9))
    solution = solve("nystrom", [down.T.copy(), down], [np.zeros((3, 9))] * 2, ["up", "down"])[1]
    largest = sorted(np.argsort(np.linalg.norm(down, axis=0))[-5:].tolist())
    form = solution.form(Choice(channels=5))
    assert form.columns.tolist() == largest
    assert np.allclose(form.form.weight.numpy(), down[:, largest])


def target(role, group, shape, **more):
    return Target(f"model.layers.0.{role}", f"model.layers.0.{role}", 0, role, group, *shape, False, **more)


def test_what_is_no_feed_forward_is_not_taken_for_one():
    good = [target("mlp.gate", "g", (30, 12)), target("mlp.up", "g", (30, 12)), target("mlp.down", "d", (12, 30))]
    assert len(feed_forwards(good)) == 1
    norm_between = [*good[:2], target("mlp.down", "d", (12, 30), bound=True)]
    attention = [target("attention.qkv", "q", (24, 12)), target("attention.dense", "o", (12, 12))]  # looks like a fused gate
    other_width = [*good[:2], target("mlp.down", "d", (12, 31))]
    gate_kept = [target("mlp.up", "g", (30, 12), siblings=2), good[2]]
    two_paths = [target("fc_in", "g", (30, 12)), target("mlp.down", "d", (12, 30))]
    for targets in (norm_between, attention, other_width, gate_kept, two_paths, good[:2], good[2:], []):
        assert feed_forwards(targets) == []


@pytest.mark.parametrize("how", ["halves", "interleaved", "biases", "no gate"])
def test_channels_of_experts_leave_only_where_nothing_else_hangs_on_them(how):
    class Experts(torch.nn.Module):
        has_gate = how != "no gate"

        def __init__(self):
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.empty(3, 12, 7))
            if how == "biases":
                self.gate_up_proj_bias = torch.nn.Parameter(torch.empty(3, 12))

        def _apply_gate(self, x):
            gate, up = (x[:, ::2], x[:, 1::2]) if how == "interleaved" else x.chunk(2, -1)
            return torch.nn.functional.silu(gate) * up

    assert experts.channels_are_free(Experts()) == (how in ("halves", "no gate"))
