"""The common matrix: every method on every tiny architecture, through the whole pipeline and back.

What must hold for any method is said once, here, over `methods()`: a new method is covered without a change to this file.
Statistics of a model are collected once and shared by all methods, as `lrc sweep` does.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import contents
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import CONFIGS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrc.calibrate.collect import Statistics, collect
from lrc.calibrate.data import Calibration, load_calibration
from lrc.calibrate.gradients import GradientSettings
from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.compress.base import NEEDS, GroupStats, LowRankSolution, Method, Settings, TargetStats, methods
from lrc.compress.forms import experts
from lrc.compress.forms.base import linear_weight
from lrc.compress.options import Choice, Shape
from lrc.model.events import Event
from lrc.model.layer_forms import target_weight
from lrc.model.targets import Target
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.plan import Draft
from lrc.plan.planner import make_draft
from lrc.run.pipeline import carry_out
from lrc.run.verify import verify

CPU = torch.device("cpu")
IDS = torch.arange(3, 40)[None]
RATIO = 0.3
ALONE = sorted(name for name, each in methods().items() if not getattr(each, "joint", None))
# less work where a method repeats something; open sizes where its settings would fix one
QUICK = {"iterations": 2, "rounds": 1, "inner_rounds": 1, "refits": 1, "power_iterations": 2, "state_bits": 8}
OPEN: dict[str, Any] = {"rank": None, "bits": None}


@cache
def settings_of(name: str) -> dict[str, Any]:
    """A method's settings for this file: quick, and with the size left to the budget."""
    chosen: dict[str, Any] = {}
    for key, value in (QUICK | OPEN).items():
        if key in methods()[name].settings.model_fields:
            try:
                methods()[name].settings(**chosen | {key: value})
            except ValidationError:
                continue
            chosen[key] = value
    return chosen


def parsed(name: str) -> tuple[Method, Settings]:
    return methods()[name], methods()[name].settings(**settings_of(name))


@dataclass(frozen=True)
class Collected:
    """A model, its calibration tokens and every statistic of them."""

    folder: Path
    view: ModelView
    calibration: Calibration
    statistics: Statistics

    @cached_property
    def original(self) -> nn.Module:
        """The model as transformers loads it."""
        return open_model(str(self.view.location.path))[0]

    def plan(self, name: str, **overrides: Any) -> Draft:
        """The plan of a recipe that names only the method."""
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(json.dumps({"method": name, "settings": settings_of(name)}))
        return make_draft(self.view, load_recipe(str(recipe), {"ratio": RATIO, "calibration.source": "pydoc"} | overrides))

    def run(self, plan: Draft, out: Path, **options: Any) -> None:
        # a run in sequence leaves its forms in the layers
        view = ModelView(self.view.location) if plan.recipe.propagate == "compressed" else self.view
        carry_out(plan, view, self.calibration, out, shared=self.folder / "statistics", **options)

    def weight(self, target: Target) -> Tensor:
        """The target's weight (out, in)."""
        name = self.view.layer_names[target.layer]
        layer = self.view.load(name)
        weight = target_weight(layer, name, target)[0].clone()
        self.view.unload(name)
        return weight

    def stats(self, target: Target) -> TargetStats:
        return self.statistics.read(self.view.layer_names[target.layer], [target.name])[target.name]

    def shapes(self) -> list[Target]:
        """One target of each shape, of the second layer."""
        found = {(t.out_features, t.in_features): t for t in self.view.targets if t.layer == 1}
        return list(found.values())


@pytest.fixture(scope="module")
def collected(tiny_checkpoints, tiny_text_file, tmp_path_factory) -> Callable[[str], Collected]:
    """A function family -> its statistics, collected once."""

    @cache
    def collected_once(family: str) -> Collected:
        folder = tmp_path_factory.mktemp(f"collected_once-{family}")
        view = ModelView(locate(str(tiny_checkpoints(family))))
        spec = load_recipe("svd-llm", {"calibration.source": f"text:{tiny_text_file}", "calibration.samples": 8,
                                       "calibration.length": 48}).calibration  # fmt: skip
        calibration = load_calibration(spec, view.location.tokenizer())
        statistics = collect(
            view, calibration, {target.name: NEEDS for target in view.targets}, folder / "statistics", [CPU], GradientSettings()
        )
        return Collected(folder, view, calibration, statistics)

    return collected_once


def tensors_of(out: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@torch.no_grad()
def matrix_of(module: nn.Module, in_features: int) -> tuple[Tensor, Tensor]:
    """The matrix (out, in) and the bias (out,) of an affine module, by feeding it unit vectors."""
    bias = module(torch.zeros(1, in_features))[0]
    return (module(torch.eye(in_features)) - bias).T, bias


def module_of(model: nn.Module, target: Target) -> nn.Module | None:
    """The module that stands for a target in a loaded artifact; None where it stayed dense among its experts."""
    if target.expert is None:
        return model.get_submodule(target.name)
    parent, parameter = model.get_submodule(target.module), target.role.rpartition(".")[2]
    return (
        parent.get_submodule(experts.stored_name(parameter, target.expert)) if hasattr(parent, parameter + "_forms") else None
    )


@torch.no_grad()
def multiplied_out(original: nn.Module, small: nn.Module, targets: Iterable[Target]) -> nn.Module:
    """A copy of the original model with the matrix of every target's module put in the place of its weight."""
    original = copy.deepcopy(original)
    for target in targets:
        if (module := module_of(small, target)) is None:
            continue
        matrix, bias = matrix_of(module, target.in_features)
        if target.expert is not None:
            parent = original.get_submodule(target.module)
            experts.expert_weight(parent, target.role.rpartition(".")[2], target.expert).copy_(matrix)
            continue
        linear = original.get_submodule(target.name)
        linear_weight(linear).copy_(matrix)
        if linear.bias is not None:
            linear.bias.copy_(bias)
        elif bias.any():
            linear.bias = nn.Parameter(bias)
    return original


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", methods())
def test_an_artifact_holds_the_bytes_of_the_plan_and_loads_as_what_was_computed(name, family, collected, tmp_path):
    model = collected(family)
    plan = model.plan(name)
    assert any(not step.choice.dense for step in plan.steps)
    model.run(plan, tmp_path / "out")
    tensors = tensors_of(tmp_path / "out")
    assert (
        sum(tensor.nbytes for tensor in tensors.values()) == plan.whole_after <= plan.whole_bytes - RATIO * plan.targets_before
    )
    small, _ = open_model(str(tmp_path / "out"))
    got = logits(small)
    kinds = {target["form"]["kind"] for target in verify(tmp_path / "out", hashes=False)["targets"]}
    pruned = "pruned" in kinds  # whose channels test_joint_models.py looks up
    whole = model.original if pruned else multiplied_out(model.original, small, (step.target for step in plan.steps))
    if not pruned and all(
        step.target.expert is None for step in plan.steps
    ):  # rounding before a router may send a token elsewhere
        assert torch.allclose(got, logits(whole), atol=1e-3 * float(got.abs().max()))
    if family in ("llama", "mixtral"):  # with and without experts; names of tensors are the family's, forms the method's
        small.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        held = small.state_dict()
        assert again.state_dict().keys() == held.keys()
        assert all(torch.equal(tensor, held[key]) for key, tensor in again.state_dict().items())
        for one in (small, again):  # where tensors lie in a file decides which instructions multiply them, and the last digit
            for parameter in one.parameters():
                parameter.data = parameter.data.clone()
        assert torch.equal(logits(again), logits(small))
        assert torch.allclose(got, logits(small), atol=1e-5 * float(got.abs().max()))
    if getattr(plan.recipe.compression[0], "joint", None):
        return
    # a target solved anew by itself, after all others: neither order nor company has a part in it
    method, settings = plan.recipe.compression
    for target in model.shapes():
        (step,) = [step for step in plan.steps if step.target == target]
        if step.choice.dense:
            continue
        form = method.solve(model.weight(target), model.stats(target), settings).form(step.choice).stored(plan.dtype)
        module = module_of(small, target)
        assert module is not None
        matrix, _ = matrix_of(module, target.in_features)
        assert torch.allclose(matrix, form.dense(), atol=1e-5 * float(matrix.abs().max()))
        prefix = (
            f"{target.module}.{experts.stored_name(target.role.rpartition('.')[2], target.expert)}" if target.expert else None
        )
        held = {key: tensors[f"{prefix or target.name}.{key}"] for key in form.tensors() if key != "bias"}
        assert all(torch.equal(held[key], form.tensors()[key]) for key in held)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("name", ALONE)
def test_the_loss_of_a_form_is_what_the_method_says_and_falls_with_the_budget(name, family, collected):
    """Losses are measured by the method's own scale: what it would lose if the error were the weight and went altogether."""
    model, (method, settings) = collected(family), parsed(name)
    for target in model.shapes():
        weight, stats = model.weight(target).double(), model.stats(target)
        solution = method.solve(weight, stats, settings)
        shape = Shape(target.out_features, target.in_features, 4, target.bias)
        options = method.options(shape, settings, 1)
        picked = [options[index] for index in sorted({0, len(options) // 3, len(options) - 1})]
        # factors on a grid bring noise of their own, of about that part at full rank
        slack = max(1e-5, 4.0 ** -(options[-1].choice.factor_bits or 16)) * solution.total
        losses = [solution.loss(option.choice) for option in picked]
        for option, loss in zip(picked, losses, strict=True):
            error = weight - solution.form(option.choice).dense()
            assert loss == pytest.approx(method.solve(error, stats, settings).total, rel=1e-3, abs=slack)
        assert all(larger <= smaller + slack for smaller, larger in pairwise(losses)), losses
        if not isinstance(solution, LowRankSolution):
            assert losses[-1] < 0.05 * solution.total, "the largest option is next to exact"
            continue
        full = solution.form(Choice(rank=min(weight.shape)))
        assert torch.allclose(full.dense(), weight, atol=1e-5 * float(weight.abs().max()))
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        for option, loss in zip(picked, losses, strict=True):
            rank = option.choice.rank
            rest = (left[:, rank:] * values[rank:]) @ right[rank:]
            plain = method.solve(rest, stats, settings).total
            assert loss <= plain * (1 + 1e-6) + slack, "no better than plain SVD where it should be best"


def singular(in_features: int, out_features: int, tokens: int) -> TargetStats:
    """Statistics of fewer tokens than channels, of which some never fire."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, in_features, generator=generator)
    x[:, 1::3] = 0
    gradients = torch.randn(tokens, out_features, generator=generator)
    mean = (lambda value: value.mean(0)) if tokens else (lambda value: torch.zeros(value.shape[1]))
    gram, scale = x.T @ x / max(tokens, 1), mean(x.abs())
    group = GroupStats(tokens, gram, mean(x), scale, mean(x.square()), peak_abs_mean=scale)
    return TargetStats(group, None, gradients.T @ gradients / max(tokens, 1), mean(x.square()))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("name", ALONE)
def test_singular_statistics(name, tokens, shape):
    """An expert that saw few tokens or none: forms are finite and lose nothing where inputs were seen, given the bytes."""
    method, settings = parsed(name)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    solution = method.solve(weight, singular(shape[1], shape[0], tokens), settings)
    options = method.options(Shape(*shape, 4), settings, 1)
    losses = [solution.loss(option.choice) for option in (options[0], options[-1])]
    for option in (options[0], options[-1]):
        form = solution.form(option.choice).stored(torch.float32)
        assert all(tensor.isfinite().all() for tensor in form.tensors().values())
        less = name in ("energy", "lord")  # the ranks that energy does not keep, the bias of lord, which is counted elsewhere
        assert form.nbytes < option.nbytes if less else form.nbytes == option.nbytes
    assert 0 <= losses[1] <= losses[0] + 1e-6 * solution.total
    assert solution.total >= 0 and solution.damping >= 0


@pytest.mark.parametrize(
    "weight", [torch.zeros(24, 40), torch.ones(24, 1) @ torch.arange(1.0, 41.0)[None]], ids=["zero", "rank 1"]
)
@pytest.mark.parametrize("name", ALONE)
def test_weights_without_much_in_them(name, weight):
    method, settings = parsed(name)
    solution = method.solve(weight, singular(40, 24, 50), settings)
    for option in (method.options(Shape(24, 40, 4), settings, 1)[index] for index in (0, -1)):
        dense = solution.form(option.choice).stored(torch.float32).dense()
        assert dense.isfinite().all()
        if getattr(settings, "rotate", False):
            # a rotation spreads the errors as draws from a Gaussian: their sum has a bound, of 1/2 at one bit and 1/4 at two;
            # errors of channels that never fire come on top, because feedback spends them freely
            allowed = 0.75 if option.choice.bits == 1 else 0.51
            assert float((dense - weight).norm()) <= allowed * float(weight.norm())
        else:
            assert torch.allclose(dense, weight, atol=0.51 * float(weight.abs().max()))
        assert solution.loss(option.choice) >= 0


class KilledError(Exception):
    pass


@pytest.mark.parametrize("name", methods())
def test_interrupted_in_sequence_after_the_first_layer_it_goes_on_to_the_same_bytes(name, collected, tmp_path):
    def stop(event: Event) -> None:
        if event.stage == "layer":
            raise KilledError

    model = collected("llama")
    # sets of targets across layers cannot be solved in sequence
    across = getattr(getattr(methods()[name], "joint", None), "across_layers", False)
    plan = model.plan(name, propagate="original" if across else "compressed")
    model.run(plan, tmp_path / "whole")
    with pytest.raises(KilledError):
        model.run(plan, tmp_path / "out", notify=stop)
    assert not (tmp_path / "out" / "config.json").exists()
    model.run(plan, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert all(target["error"] is None or 0 <= target["error"] <= 1 for target in verify(tmp_path / "out")["targets"])


@pytest.mark.parametrize("name", methods())
def test_how_samples_are_batched_changes_nothing_but_rounding(name, collected, tiny_text_file, tmp_path, monkeypatch):
    model = collected("llama")
    errors = []
    for tokens in (48, 8 * 48):
        monkeypatch.setattr("lrc.plan.planner.TOKENS_PER_BATCH", tokens)
        monkeypatch.setattr("lrc.calibrate.collect.TOKENS_PER_BATCH", tokens)
        plan = model.plan(name, **{"calibration.length": 48})
        out = tmp_path / str(tokens)
        carry_out(plan, model.view, model.calibration, out, shared=tmp_path / f"statistics-{tokens}")
        targets = json.loads((out / "lrc.json").read_text())["targets"]  # of a set, some may stay dense
        errors.append({target["name"]: target["error"] for target in targets if target["error"] is not None})
    one, two = errors
    assert one.keys() == two.keys()
    # a tie between two codes or two atoms may fall either way: of one target some percent, of all together next to nothing
    assert all(one[target] == pytest.approx(two[target], rel=0.1, abs=1e-6) for target in one)
    assert sum(one.values()) == pytest.approx(sum(two.values()), rel=5e-3)
    assert plan.batch == 8
