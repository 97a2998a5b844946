"""Recipes of two steps, shared statistics, and budgets that look at losses, on the real path."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from commandline import lrc_ok
from pipeline import compress
from tiny import tiny_text
from transformers import AutoModelForCausalLM

from lrc.calibrate.data import load_calibration
from lrc.calibrate.store import StatsStore
from lrc.checkpoint.atomic import read_json, write_json
from lrc.checkpoint.location import locate
from lrc.compress.base import GroupStats, Settings, Solution, TargetStats, get_method
from lrc.compress.chain import chain, refit
from lrc.compress.forms.base import build_module, fill_module
from lrc.compress.options import Choice, Option, Shape
from lrc.errors import RecipeError, RequestError
from lrc.model.view import ModelView
from lrc.plan.knapsack import uniform
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.run.pipeline import carry_out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_text(6000))
    return path


class _Kept(Settings):
    """A second step for the test: low rank again, of a fixed rank."""

    rank: int = 3


def _second():
    first = get_method("svd-llm")

    def options(shape: Shape, settings: _Kept, multiple: int) -> list[Option]:
        nbytes = settings.rank * (shape.out_features + shape.in_features) * shape.element
        return [Option(Choice(rank=settings.rank), nbytes)] if nbytes < shape.nbytes else []

    return type(first)("svd-llm", first.solve, _Kept, first.needs, first.source, options)


def _problem(tokens: int = 300):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 14, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, 14, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 14, dtype=torch.float64)
    return weight, x


def test_a_second_step_compresses_both_factors_and_refits_the_left_one():
    weight, x = _problem()
    gram = x.T @ x / len(x)
    both = chain(get_method("svd-llm"), _second())
    settings = both.settings(first=Settings(), second=_Kept(rank=4))
    solution: Solution = both.solve(weight, TargetStats(GroupStats(len(x), gram)), settings)
    form = solution.form(Choice(rank=8))
    error = ((x @ (weight - form.dense()).T) ** 2).sum(1).mean()
    assert solution.loss(Choice(rank=8)) == pytest.approx(float(error), rel=1e-9)
    # 8 components squeezed through 4 are as good as 4 at once: the second step loses nothing that it need not lose
    best = get_method("svd-llm").solve(weight, TargetStats(GroupStats(len(x), gram)), Settings())
    assert float(error) == pytest.approx(best.loss(Choice(rank=4)), rel=1e-6)
    module = fill_module(build_module(form.spec(), 14, 20, torch.float64), form.stored(torch.float64).tensors())
    assert torch.allclose(module(x), x @ form.dense().T)


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_second_step_leaves_as_it_is_what_calibration_did_not_see(tokens):
    """An expert that few tokens reached, or none: the product is the first step's, rounded, and not zero."""
    weight, x = _problem(tokens)
    stats = TargetStats(GroupStats(tokens, x.T @ x / max(tokens, 1)))
    first, second = get_method("svd-llm"), get_method("rtn")
    both = chain(first, second)
    settings = both.settings(first=first.settings(), second=second.settings(bits=8, group_size=4))
    choice = Choice(rank=8)
    plain = first.solve(weight, stats, first.settings()).form(choice).dense()
    form = both.solve(weight, stats, settings).form(choice)
    assert float(plain.norm()) > 0.5 * float(weight.norm())
    assert float((form.dense().double() - plain).norm()) < 0.02 * float(plain.norm())


@pytest.mark.parametrize("fused", [False, True])
def test_a_second_step_compresses_what_pruned_channels_leave(fused):
    """Each smaller matrix as a weight of its own, the reader's on the channels that it still reads; bytes as offered."""
    generator = torch.Generator().manual_seed(3)
    sublayers, inner, width = 2 if fused else 1, 40, 24
    shapes = [Shape(sublayers * inner, width, 2, True), Shape(width, inner, 2)]
    parts = ["gate and up" if fused else "up", "down"]
    weights = [torch.randn(shape.out_features, shape.in_features, generator=generator) for shape in shapes]
    x, h = torch.randn(200, width, generator=generator), torch.randn(200, inner, generator=generator).cumsum(1)
    stats = [TargetStats(GroupStats(200, each.T @ each / 200)) for each in (x, h)]
    first, second = get_method("nystrom"), get_method("gptq")
    both = chain(first, second)
    grid = second.settings(bits=4, group_size=8)
    settings = both.settings(first=first.settings(), second=grid)
    option = next(o for o in both.joint.options(shapes, parts, settings, 1) if o.choice.channels == 20)
    forms = [each.form(option.choice) for each in both.joint.solve(weights, stats, parts, settings)]
    plain = [each.form(option.choice) for each in first.joint.solve(weights, stats, parts, first.settings())]
    kept = plain[1].columns
    grams = [stats[0].group.gram, h[:, kept].T @ h[:, kept] / 200]
    for form, before, gram, shape, member in zip(forms, plain, grams, shapes, option.members, strict=True):
        expected = second.solve(before.form.weight, TargetStats(GroupStats(200, gram)), grid).form(Choice(bits=4)).dense()
        assert torch.allclose(form.dense()[form.rows[:, None], form.columns].double(), expected.double(), atol=1e-5)
        assert int(form.dense().ne(0).any(1).sum()) <= len(form.rows) and int(form.dense().ne(0).any(0).sum()) <= len(
            form.columns
        )
        stored = form.with_bias(torch.ones(shape.out_features) if shape.bias else None).stored(torch.bfloat16)
        gone = (shape.out_features - len(form.rows)) * 2 if shape.bias else 0
        assert stored.nbytes - gone == member.nbytes
        module = fill_module(
            build_module(json.loads(json.dumps(stored.spec())), shape.in_features, shape.out_features), stored.tensors()
        )
        y = module(torch.eye(len(form.columns), dtype=torch.bfloat16)) - (1 if shape.bias else 0)
        assert torch.allclose(y.T, stored.dense()[form.rows[:, None], form.columns], atol=0.03)
    assert option.nbytes == sum(member.nbytes for member in option.members)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_channels_then_bits_on_the_real_path(family, tiny_checkpoints, text, tmp_path):
    wish = {"steps": [{"method": "nystrom"}, {"method": "gptq", "settings": {"bits": 4, "group_size": 16}}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(wish))
    plan = compress(tiny_checkpoints(family), tmp_path / "out", text, str(tmp_path / "recipe.yaml"), ratio=0.85)
    assert 0.85 <= plan.ratio < 0.88
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(6)[None]).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("recipe", "named", "more"),
    [("svd-llm+gptq", ["svd-llm", "gptq"], []), ("prune+svd", ["layers dropped", "svd-llm"], ["--set", "depth.ratio=0.33"])],
)
def test_a_plan_says_what_each_step_leaves(recipe, named, more, tiny_checkpoints):
    printed = lrc_ok("plan", tiny_checkpoints("llama"), "--recipe", recipe, "--ratio", 0.7, *more)
    line = next(line for line in printed.splitlines() if line.startswith("steps: "))
    assert re.findall(r"\((.*?)\)", line) == named
    numbers = [float(each) for each in re.findall(r"([\d.]+) kB", line)]
    assert len(numbers) == 3 and numbers == sorted(numbers, reverse=True)
    removed = next(line for line in printed.splitlines() if line.startswith("removed: "))
    at, left = (float(each) for each in re.search(r"\(([\d.]+) kB → ([\d.]+) kB", removed).groups())
    assert (at, left) == (numbers[0], numbers[-1])
    assert float(re.search(r"([\d.]+) bits per weight", removed)[1]) == pytest.approx(32 * left / at, rel=0.02)


@pytest.mark.parametrize("tokens", [5, 300])
def test_a_refit_is_least_squares_and_takes_singular_inputs(tokens):
    weight, x = _problem(tokens)
    z = x[:, :9]
    found = refit(weight @ (x.T @ z) / tokens, z.T @ z / tokens)
    expected = torch.linalg.lstsq(z, x @ weight.T, driver="gelsd").solution.T
    assert torch.allclose(z @ found.T, z @ expected.T, atol=1e-6)


def test_what_cannot_be_told_of_a_factor_is_refused():
    with pytest.raises(RecipeError, match="asvd cannot follow svd-llm: it needs abs_mean"):
        _load({"steps": [{"method": "svd-llm"}, {"method": "asvd"}]})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"steps": [{"method": "svd"}, {"method": "svd-lm"}]}, "Did you mean 'svd-llm'"),
        ({"method": "svd", "steps": [{"method": "svd"}]}, "not both"),
        ({"ratio": 0.2}, "'method' is missing"),
    ],
)
def test_mistakes_in_steps_are_named(wanted, message):
    with pytest.raises(RecipeError, match=message):
        _load(wanted)


def _load(wanted):
    import tempfile
    from pathlib import Path

    import yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(wanted))
        return load_recipe(str(path))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_stored_statistics_give_the_bytes_of_a_run_that_collects_its_own(family, tiny_checkpoints, text, tmp_path):
    compress(tiny_checkpoints(family), tmp_path / "own", text, ratio=0.3)
    _prepared(tiny_checkpoints(family), tmp_path / "shared", text, tmp_path / "statistics", ratio=0.3)
    files = sorted(path.name for path in (tmp_path / "own").glob("*.safetensors"))
    assert files
    for name in files:
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()


def _prepared(model, out, text, statistics, recipe="svd-llm", **overrides):
    wanted = {"calibration.source": f"text:{text}", "calibration.samples": 8, "calibration.length": 48} | overrides
    view = ModelView(locate(str(model)))
    draft = make_draft(view, load_recipe(recipe, wanted))
    calibration = load_calibration(draft.recipe.calibration, view.location.tokenizer())
    return carry_out(draft, view, calibration, out, shared=statistics).plan


def test_a_budget_that_looks_at_losses_keeps_its_promise_and_loses_less(tiny_checkpoints, text, tmp_path):
    even = compress(tiny_checkpoints("llama"), tmp_path / "even", text, ratio=0.3)
    plan = _prepared(tiny_checkpoints("llama"), tmp_path / "out", text, None, ratio=0.3, allocation="spectrum")
    assert plan.targets_after <= 0.7 * plan.targets_before
    assert {step.choice.rank for step in plan.steps} != {step.choice.rank for step in even.steps}

    def lost(folder):
        return sum(target["error"] or 0.0 for target in json.loads((folder / "lrc.json").read_text())["targets"])

    assert lost(tmp_path / "out") < lost(tmp_path / "even")
    assert not (tmp_path / "out" / ".lrc-statistics").exists()
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(6)[None]).logits
    assert torch.isfinite(logits).all()


def test_a_method_that_fixes_the_size_needs_no_ratio():
    options = {"x": (100, [Option(Choice(bits=4), 30)])}
    assert uniform(options, None)["x"].nbytes == 30
    assert uniform({"x": (20, [Option(Choice(bits=4), 30)])}, None)["x"].choice.dense


@pytest.mark.parametrize(("recipe", "overrides"), [
    ("lrc-fast", {"ratio": 0.3}),
    ("compot", {"ratio": 0.3, "allocation": "kl"}),
    ("kfac", {"ratio": 0.3}),
    ("kfac", {"ratio": 0.3, "allocation": "fisher"}),
    ("kfac", {"ratio": 0.3, "allocation": "fisher", "propagate": "compressed"}),
    ("lrc-gradient", {"ratio": 0.3}),
    ("nystrom-kfac", {"ratio": 0.3, "allocation": "fisher"}),
])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_recipes_that_look_at_the_whole_model_first(family, recipe, overrides, tiny_checkpoints, text, tmp_path):
    plan = _prepared(tiny_checkpoints(family), tmp_path / "out", text, tmp_path / "statistics", recipe, **overrides)
    assert plan.targets_after <= 0.7 * plan.targets_before
    assert plan.targets_after > 0.65 * plan.targets_before
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(6)[None]).logits
    assert torch.isfinite(logits).all()


def test_statistics_are_collected_anew_only_where_something_is_missing(tmp_path):
    def store(*needs, of="model"):
        return StatsStore(tmp_path, {"of": of}, {"x": frozenset(needs)})

    gram = torch.eye(3)
    store("gram", "mean").write("layers.0", {"x": TargetStats(GroupStats(5, gram, torch.ones(3)))})
    assert store("mean").has("layers.0")
    assert store("output_gram").has("layers.0"), "the gram of the inputs says what the outputs' would say"
    found = store("gram").read("layers.0", ["x"])["x"].group
    assert found.tokens == 5 and torch.equal(found.gram, gram)
    assert not store("abs_mean").has("layers.0")
    store("gram").write("layers.0", {"x": TargetStats(GroupStats(5, gram))})
    assert not store("gram", of="another model").has("layers.0")


def test_what_a_killed_process_left_half_written_goes_when_statistics_are_collected(tmp_path):
    store = StatsStore(tmp_path, {"of": "model"}, {"x": frozenset({"gram"})})
    half = tmp_path / "layers.0.safetensors.4711.lrc-partial"
    half.write_bytes(b"half")
    with store.alone():
        assert not half.exists()


def test_statistics_that_another_process_works_from_are_not_taken_from_under_it(tmp_path):
    def store(of="model"):
        return StatsStore(tmp_path, {"of": of}, {"x": frozenset({"gram"})})

    reader = store()
    with reader.alone():
        with pytest.raises(RequestError, match="Another lrc works with the statistics"):
            store()
        reader.write("layers.0", {"x": TargetStats(GroupStats(5, torch.eye(3)))})
    assert store().has("layers.0"), "two may read"
    with pytest.raises(RequestError, match="another folder"):
        store(of="another model")
    assert torch.equal(reader.read("layers.0", ["x"])["x"].group.gram, torch.eye(3))
    with pytest.raises(KeyError), reader.alone():
        raise KeyError
    assert not store(of="another model").has("layers.0"), "what failed holds up nobody"


def test_losses_outlive_another_layout_of_the_statistics(tmp_path):
    """What an older lrc collected is collected anew; what it measured on it took far longer, and still holds."""
    needs = {"x": frozenset({"gram"})}
    StatsStore(tmp_path, {"of": "model"}, needs).write("layers.0", {"x": TargetStats(GroupStats(5, torch.eye(3)))})
    (tmp_path / "nats-1.json").write_text("{}")
    manifest = tmp_path / "statistics.json"
    write_json(manifest, read_json(manifest, dict[str, Any]) | {"layout": 1, "needs": {}})
    assert not StatsStore(tmp_path, {"of": "model"}, needs).has("layers.0") and (tmp_path / "nats-1.json").is_file()
    StatsStore(tmp_path, {"of": "another"}, needs)
    assert not (tmp_path / "nats-1.json").is_file()
