"""Recipes with alternatives: one budget over several methods' forms, on the real path."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from pipeline import compress
from safetensors.torch import load_file

from lrc.calibrate.data import CalibrationSpec, load_calibration
from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.compress.base import Curve, GroupStats, TargetStats, get_method
from lrc.compress.mixture import MixtureSettings, mixture
from lrc.compress.options import Choice, Option, Shape
from lrc.errors import CalibrationError, LrcError, RecipeError
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.run.losses.curves import thinned
from lrc.run.losses.probe import probed, scaled
from lrc.run.verify import verify

BOTH = [{"method": "svd-llm"}, {"method": "gptq", "settings": {"bits": None, "group_size": 16}}]


@pytest.fixture
def recipe(tmp_path):
    def write(**content) -> str:
        import yaml

        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({"alternatives": BOTH, "allocation": "kl"} | content))
        return str(file)

    return write


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_one_budget_over_ranks_and_bits(family, recipe, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints(family)
    plan = compress(model, tmp_path / "out", tiny_text_file, recipe(), ratio=0.75, dtype=torch.bfloat16)
    record = verify(tmp_path / "out")
    held = {name: t for shard in record["shards"] for name, t in load_file(tmp_path / "out" / shard).items()}
    assert sum(t.numel() * t.element_size() for t in held.values()) == plan.whole_after
    assert plan.targets_after <= 0.25 * plan.targets_before
    kinds = {target["form"]["kind"] for target in record["targets"]}
    assert "quantized" in kinds and kinds <= {"quantized", "low-rank", "dense"}
    logits = open_model(str(tmp_path / "out"))[0](torch.arange(3, 40)[None]).logits
    assert torch.isfinite(logits).all()


CHANNELS = [
    *BOTH,
    {"method": "nystrom"},
    {"steps": [{"method": "nystrom"}, {"method": "gptq", "settings": {"bits": 4, "group_size": 16}}]},
]


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "mixtral"])
@pytest.mark.parametrize("propagate", ["original", "compressed"])
def test_one_budget_over_channels_ranks_and_bits(family, propagate, recipe, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints(family)
    wish = recipe(alternatives=CHANNELS, propagate=propagate)
    plan = compress(model, tmp_path / "out", tiny_text_file, wish, ratio=0.8, dtype=torch.bfloat16)
    record = verify(tmp_path / "out")
    held = {name: t for shard in record["shards"] for name, t in load_file(tmp_path / "out" / shard).items()}
    assert sum(t.numel() * t.element_size() for t in held.values()) == plan.whole_after
    assert plan.targets_after <= 0.2 * plan.targets_before
    forms = [target["form"] for target in record["targets"]]
    assert "quantized" in {form["form"]["kind"] for form in forms if form["kind"] == "pruned"}
    assert {form["kind"] for form in forms} <= {"quantized", "low-rank", "dense", "pruned"}
    ways = [
        {step.choice.alternative for step in plan.steps if step.target in unit.targets} for unit in plan.units if unit.slots
    ]
    assert ways and all(len(alternative) == 1 for alternative in ways), "a set gets one alternative"
    logits = open_model(str(tmp_path / "out"))[0](torch.arange(3, 40)[None]).logits
    assert torch.isfinite(logits).all()


def test_more_bytes_never_predict_more_loss(recipe, tiny_checkpoints, tiny_text_file, tmp_path):
    divergences = []
    ids = torch.arange(3, 40)[None]
    original = open_model(str(tiny_checkpoints("llama")))[0](ids).logits.log_softmax(-1).detach()
    for ratio in (0.85, 0.7, 0.5):
        compress(tiny_checkpoints("llama"), tmp_path / str(ratio), tiny_text_file, recipe(), ratio=ratio)
        logits = open_model(str(tmp_path / str(ratio)))[0](ids).logits.log_softmax(-1).detach()
        divergences.append(float((original.exp() * (original - logits)).sum(-1).mean()))
    assert all(a > b for a, b in pairwise(divergences))


def test_alternatives_are_solved_when_they_are_asked_for_and_in_one_metric():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 16, generator=generator), torch.randn(90, 16, generator=generator)
    gram = x.T @ x / len(x)
    stats = TargetStats(GroupStats(len(x), gram, mean_square=gram.diagonal(), abs_mean=x.abs().mean(0)))
    # one that says that it reads the same statistics, and measures in another metric
    methods = [get_method("svd-llm"), get_method("gptq"), replace(get_method("asvd"), needs=frozenset({"gram"}))]
    settings = MixtureSettings(alternatives=tuple(m.settings() for m in methods))
    solution = mixture(methods).solve(weight, stats, settings)
    for choice, name in ((Choice(rank=3, alternative=0), "svd-llm"), (Choice(bits=4, alternative=1), "gptq")):
        alone = get_method(name).solve(weight, stats, get_method(name).settings())
        own = Choice(rank=choice.rank, bits=choice.bits)
        assert solution.loss(choice) == pytest.approx(alone.loss(own))
        assert torch.equal(solution.form(choice).dense(), alone.form(own).dense())
    with pytest.raises(LrcError, match="asvd and|and asvd"):
        solution.loss(Choice(rank=3, alternative=2))


@pytest.mark.parametrize("pair", [("gptq", "yaqa"), ("svd-llm", "asvd"), ("rtn", "gptq"), ("lqer", "qera")], ids=str)
def test_alternatives_in_different_metrics_are_refused_when_the_recipe_is_read(pair, recipe):
    with pytest.raises(RecipeError, match="measure losses in different metrics.*such as svd-llm, gptq"):
        load_recipe(recipe(alternatives=[{"method": name} for name in pair]))


@pytest.mark.parametrize("pair", [("svd-llm", "compot"), ("gptq", "lord"), ("kfac", "yaqa"), ("rtn", "lqer")], ids=str)
def test_alternatives_in_one_metric_are_not(pair, recipe):
    assert load_recipe(recipe(alternatives=[{"method": name} for name in pair])).compression[0].name == " | ".join(pair)


def test_every_alternative_is_probed_and_thinned_by_itself():
    ranks = [Option(Choice(rank=r, alternative=0), 10 * r) for r in range(1, 200)]
    bits = [Option(Choice(bits=b, alternative=1), 125 * b + 3) for b in (2, 3, 4, 5, 6, 8)]
    options = sorted(ranks + bits, key=lambda option: option.nbytes)
    kept = thinned(options, 10)
    assert [o for o in kept if o.choice.alternative == 1] == bits and sum(o.choice.alternative == 0 for o in kept) == 10
    assert {options[i].choice for i in probed(options, 2000)} == {
        Choice(rank=60, alternative=0),
        Choice(rank=120, alternative=0),
        *(Choice(bits=bits, alternative=1) for bits in (2, 3, 4)),
    }


def test_losses_in_nats_pass_through_the_probes_of_their_own_alternative():
    low_rank = [Option(Choice(rank=rank, alternative=0), nbytes) for rank, nbytes in ((1, 10), (2, 20))]
    codes = [Option(Choice(bits=bits, alternative=1), nbytes) for bits, nbytes in ((2, 11), (3, 21), (4, 30), (5, 40))]
    options = sorted(low_rank + codes, key=lambda option: option.nbytes)
    losses = (8.0, 6.0, 2.0, 1.5, 0.4, 0.1)
    points = {0: 0.8, 1: 3.0, 2: 0.1, 3: 0.3, 4: 0.08}
    found = scaled({"x": Curve(10.0, tuple(options), losses)}, points)["x"].losses
    assert all(found[index] == pytest.approx(nats) for index, nats in points.items())
    assert found[5] == pytest.approx(0.02, rel=1e-6)  # the power law through 3 and 4 bits goes on


def test_an_allocation_that_cannot_choose_is_refused(recipe):
    with pytest.raises(RecipeError, match="allocation: uniform cannot choose between alternatives"):
        load_recipe(recipe(allocation="uniform"))
    with pytest.raises(RecipeError, match="'method' or 'alternatives'"):
        load_recipe(recipe(method="svd-llm"))


def test_more_than_two_steps_are_refused_wherever_they_stand(recipe):
    three = [{"method": "svd-llm"}, *[{"method": "gptq", "settings": {"bits": 4}}] * 2]
    with pytest.raises(RecipeError, match=r"alternatives\.1: 'steps' has 3 methods"):
        load_recipe(recipe(alternatives=[{"method": "gptq"}, {"steps": three}]))
    with pytest.raises(RecipeError, match="'steps' has 3 methods"):
        load_recipe(recipe(alternatives=[], steps=three))


def test_held_out_windows_share_no_token_with_the_samples(tiny_checkpoints, tiny_text_file, tmp_path):
    tokenizer = ModelView(locate(str(tiny_checkpoints("llama")))).location.tokenizer()
    spec = CalibrationSpec(source=f"text:{tiny_text_file}", samples=6, length=40)
    plain, both = load_calibration(spec, tokenizer), load_calibration(spec.model_copy(update={"held_out": 3}), tokenizer)
    assert torch.equal(plain.tokens, both.tokens) and plain.hash == both.hash and both.held_out.shape == (3, 40)
    rows = {tuple(row) for row in both.tokens.tolist()}
    assert not rows & {tuple(row) for row in both.held_out.tolist()}
    short = tmp_path / "short.txt"
    short.write_text(" ".join(tiny_text_file.read_text().split()[:150]))
    with pytest.raises(CalibrationError, match="too short for 6 samples and 3 held-out windows"):
        load_calibration(CalibrationSpec(source=f"text:{short}", samples=6, length=40, held_out=3), tokenizer)


def test_every_number_of_bits_is_optioned_in_its_exact_bytes():
    method = get_method("gptq")
    options = method.options(Shape(576, 1536, 2), method.settings(bits=None, group_size=64), 1)
    assert [option.choice.bits for option in options] == [2, 3, 4, 5, 6, 8]
    # codes + 24 groups of a two-byte step and a packed zero
    assert [option.nbytes for option in options] == [576 * (1536 * b // 8 + 48 + -(-24 * b // 8)) for b in (2, 3, 4, 5, 6, 8)]
