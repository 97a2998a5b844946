"""Repairs after dropped layers, and searches for what to drop: real checkpoints on the real path."""

from __future__ import annotations

import json

import pytest
import torch
from commandline import contents, run_lrc
from shallow import IDS, compress, deep, logits, without
from stock import logits_without_lrc
from transformers import AutoModelForCausalLM

from lrc.calibrate.data import load_calibration
from lrc.calibrate.generate import generator
from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.depth.base import repairs
from lrc.depth.repair import divided
from lrc.depth.repairs.linear_map import LeastSquares
from lrc.errors import BudgetError, RecipeError
from lrc.model.ablation import losses
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.run.pipeline import carry_out
from lrc.run.verify import verify


@pytest.fixture(scope="module")
def operate():
    """A function (model, out, recipe, overrides) -> (plan, calibration): the pipeline on text that the model itself writes.

    On such text the original predicts best, so that what brings a model nearer to it lowers the loss; on other text a model of
    random weights has no reason to.
    """
    written = {}

    def operate(model, out, recipe="block-influence", notify=lambda report: None, statistics=None, **overrides):
        wanted = {"calibration.source": "self", "calibration.samples": 64, "calibration.length": 32} | overrides

        def once(samples, length, seed):
            key = (model, samples, length)
            if key not in written:
                written[key] = generator(str(model), torch.float32, torch.device("cpu"))(samples, length, seed)
            return written[key]

        view = ModelView(locate(str(model)))
        draft = make_draft(view, load_recipe(recipe, wanted))
        calibration = load_calibration(draft.recipe.calibration, view.location.tokenizer(), once)
        return carry_out(draft, view, calibration, out, shared=statistics, notify=notify).plan, calibration

    return operate


def loss_of(model, windows):
    """Mean negative log likelihood in float64."""
    with torch.no_grad():
        words = model(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return -float(words.gather(-1, windows[:, 1:, None]).mean())


# --- greedy by loss ----------------------------------------------------------------------------------------------------------


def test_sleb_takes_the_layer_whose_absence_costs_least(tiny_checkpoints, tiny_text_file, tmp_path):
    model = deep(tiny_checkpoints)
    overrides = {"depth.drop": 2, "depth.loss_samples": 8, "depth.loss_length": 32}
    plan, calibration = compress(model, tmp_path / "out", tiny_text_file, "sleb", **overrides)
    assert set(plan.dropped) <= {1, 2, 3}

    def loss(dropped):
        return loss_of(without(AutoModelForCausalLM.from_pretrained(model), dropped), calibration.tokens)

    record = json.loads((tmp_path / "out" / "lrc.json").read_text())["depth"]["score"]
    first = {layer: loss({layer}) for layer in (1, 2, 3)}
    assert record["rounds"][0]["gone"] == [min(first, key=first.get)]
    assert record["rounds"][0]["loss"] == pytest.approx(min(first.values()), rel=1e-5)
    second = {layer: loss({*record["rounds"][0]["gone"], layer}) for layer in {1, 2, 3} - set(record["rounds"][0]["gone"])}
    assert record["rounds"][1]["loss"] == pytest.approx(min(second.values()), rel=1e-5)
    assert list(plan.dropped) == record["rounds"][1]["gone"]


# --- repairs on the real path ------------------------------------------------------------------------------------------------

TRAINING = {"depth.training.lr": 3e-3, "depth.training.batch_tokens": 64, "depth.training.epochs": 3}
REPAIRS = {
    "linear-patch": ("block-influence", {}, False),
    "linear-map": ("block-influence", {}, False),
    "replace-me": ("block-influence", {}, True),
    "streamline": ("angular", TRAINING, True),
    "partial-finetune": ("last", TRAINING | {"depth.training.lr": 1e-3}, True),
}


NEED_LRC = {("replace-me", "gemma3_text"), ("replace-me", "mixtral")}  # a norm, or a mixture, comes behind the matrix


def test_every_repair_is_tested():
    assert set(REPAIRS) == set(repairs())


MATRIX = [*((name, "llama") for name in REPAIRS), *(("replace-me", family) for family in ("gpt2", "gemma3_text", "mixtral")),
          ("linear-map", "gpt2"), ("streamline", "gemma3_text")]  # fmt: skip


@pytest.mark.parametrize(("name", "family"), MATRIX)
def test_a_repair_helps_on_text_it_did_not_see(name, family, operate, tiny_checkpoints, tmp_path):
    score, overrides, plain = REPAIRS[name]
    model = deep(tiny_checkpoints, family)
    common = {"depth.score": score, "depth.drop": 2}
    plan, calibration = operate(model, tmp_path / "out", **common, **overrides, **{"depth.repair": name})
    assert len(plan.dropped) == 2
    record = verify(tmp_path / "out")["depth"]["repair"]
    held = divided(calibration.tokens, 0.125).held_out
    assert record["repair"] == name and record["held_out_tokens"] == held.numel()
    assert record["loss"] < record["loss_without"]
    # both losses again, in float64: of the checkpoint, and of the original without those layers
    assert record["loss"] == pytest.approx(loss_of(open_model(str(tmp_path / "out"))[0], held), rel=1e-5)
    plainly = without(AutoModelForCausalLM.from_pretrained(model), plan.dropped)
    assert record["loss_without"] == pytest.approx(loss_of(plainly, held), rel=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" not in config) == (plain and (name, family) not in NEED_LRC)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()], "nothing of the run's own is left"


def test_a_patch_is_laid_where_the_run_was(operate, tiny_checkpoints, tmp_path):
    """A run at the very end: the checkpoint against the original with the map applied by hand."""
    model = deep(tiny_checkpoints)
    overrides = {"depth.score": "angular", "depth.drop": 2, "depth.protect_first": 3, "depth.protect_last": 0}
    plan, _ = operate(model, tmp_path / "out", **overrides, **{"depth.repair": "linear-map"})
    assert plan.dropped == (3, 4)
    record = json.loads((tmp_path / "out" / "lrc.json").read_text())["depth"]["repair"]
    assert record["runs"][0]["accepted"]
    loaded = open_model(str(tmp_path / "out"))[0]
    patch = loaded.model.layers[2].stream_map
    original = without(AutoModelForCausalLM.from_pretrained(model), plan.dropped)
    original.model.layers[2].register_forward_hook(
        lambda m, args, output: output + torch.nn.functional.linear(output, patch.weight, patch.bias)
    )
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, original(IDS, use_cache=False).logits, atol=1e-5)
    done = logits_without_lrc(tmp_path / "out", tmp_path / "logits.pt")
    assert done.returncode != 0 and "compressed by lrc" in done.stderr + done.stdout
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, loaded(IDS).logits)


def test_replace_me_is_the_papers_least_squares_and_loads_without_lrc(operate, tiny_checkpoints, tmp_path):
    model = deep(tiny_checkpoints, "gpt2")
    overrides = {"depth.drop": 2, "depth.protect_first": 2}
    plan, calibration = operate(model, tmp_path / "out", "replace-me", **overrides)
    assert plan.dropped == (2, 3)
    assert json.loads((tmp_path / "out" / "lrc.json").read_text())["depth"]["repair"]["runs"][0]["accepted"]
    original = AutoModelForCausalLM.from_pretrained(model).double()
    seen = {}
    h = original.transformer.h
    h[1].mlp.register_forward_hook(lambda m, args, output: seen.update(M=output))
    h[1].register_forward_hook(lambda m, args, output: seen.update(out=output[0] if isinstance(output, tuple) else output))
    h[3].register_forward_hook(lambda m, args, output: seen.update(goal=output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        original(divided(calibration.tokens, 0.125).train)
    m, out, goal = (seen[key].flatten(0, 1) for key in ("M", "out", "goal"))
    t = torch.linalg.lstsq(m, goal - (out - m), driver="gelsd").solution
    c_proj = h[1].mlp.c_proj
    done = logits_without_lrc(tmp_path / "out", tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").transformer.h[1].mlp.c_proj
    assert torch.allclose(found.weight.double(), c_proj.weight @ t, atol=2e-3)
    assert torch.allclose(found.bias.double(), c_proj.bias @ t, atol=2e-3)


def test_what_is_left_after_a_repair_is_compressed_too(operate, tiny_checkpoints, tmp_path):
    overrides = {"depth.repair": "linear-map", "depth.drop": 1, "method": "svd-llm"}
    plan, _ = operate(deep(tiny_checkpoints), tmp_path / "out", ratio=0.5, **overrides)
    record = verify(tmp_path / "out")
    assert record["depth"]["repair"]["runs"][0]["accepted"] and 0.5 <= plan.ratio < 0.55
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert sorted({spec["kind"] for spec in modules.values()}) == ["low-rank", "map"]


def test_a_killed_run_goes_on_without_choosing_or_training_again(operate, tiny_checkpoints, tmp_path, monkeypatch):
    model = deep(tiny_checkpoints)
    wanted = {"depth.drop": 2, "depth.repair": "linear-map", "method": "svd-llm", "ratio": 0.6, "propagate": "compressed"}

    class KilledError(Exception):
        pass

    def kill(report):
        if report.stage == "layer" and report.done > 1:  # one layer is finished, the next one just now
            raise KilledError

    with pytest.raises(KilledError):
        operate(model, tmp_path / "killed", "sleb", notify=kill, **wanted)
    with monkeypatch.context() as patched:
        patched.setattr("lrc.run.depth_stage.choose_removed", lambda *_: pytest.fail("chosen again"))
        operate(model, tmp_path / "killed", "sleb", **wanted)
    operate(model, tmp_path / "straight", "sleb", **wanted)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    assert json.loads((tmp_path / "killed" / "lrc.json").read_text())["depth"]["repair"]["runs"][0]["accepted"]


@pytest.mark.parametrize(
    ("few", "more"),
    [
        ({"depth.drop": 2}, {"depth.drop": 3}),
        ({"depth.ratio": 0.3, "depth.granularity": "sub-layer"}, {"depth.ratio": 0.5, "depth.granularity": "sub-layer"}),
    ],
)
def test_a_killed_search_goes_on_with_its_round_and_one_for_more_parts_after_it(
    few, more, operate, tiny_checkpoints, tmp_path, monkeypatch
):
    model, tried, last = deep(tiny_checkpoints), [], 1

    def counted(view, tokens, variants, device):
        if len(tried) == last:
            raise KeyboardInterrupt
        tried.append(len(variants))
        return losses(view, tokens, variants, device)

    monkeypatch.setattr("lrc.depth.choose.losses", counted)
    with pytest.raises(KeyboardInterrupt):
        operate(model, tmp_path / "killed", "sleb", **few)
    last = None
    operate(model, tmp_path / "killed", "sleb", **few)
    in_two, tried = tried, []
    operate(model, tmp_path / "straight", "sleb", statistics=tmp_path / "statistics", **few)
    assert tried == in_two and len(tried) > 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    tried = []
    operate(model, tmp_path / "more", "sleb", statistics=tmp_path / "statistics", **more)
    after, tried = tried, []
    operate(model, tmp_path / "alone", "sleb", **more)
    assert after == tried[len(in_two) :]
    assert contents(tmp_path / "more") == contents(tmp_path / "alone")


def test_a_repair_that_only_hurts_is_left_out_and_the_record_says_so(operate, tiny_checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(LeastSquares, "change", lambda self: (50 * torch.eye(48, dtype=torch.float64), None))
    model = deep(tiny_checkpoints)
    operate(model, tmp_path / "none", **{"depth.drop": 2})
    operate(model, tmp_path / "out", **{"depth.drop": 2, "depth.repair": "replace-me"})
    record = json.loads((tmp_path / "out" / "lrc.json").read_text())["depth"]["repair"]
    assert not any(run["accepted"] for run in record["runs"]) and record["loss"] == record["loss_without"]
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "none"))


def test_streamline_trains_one_layer_and_leaves_all_others(operate, tiny_checkpoints, tmp_path):
    model = deep(tiny_checkpoints)
    plan, _ = operate(model, tmp_path / "out", "streamline", **{"depth.drop": 2}, **TRAINING)
    first = plan.dropped[0] - 1
    record = json.loads((tmp_path / "out" / "lrc.json").read_text())["depth"]["repair"]
    assert record["runs"][0]["layers"] == [first, *plan.dropped]
    assert record["training"]["best"] < 0.9 * record["training"]["start"]
    old, new = (AutoModelForCausalLM.from_pretrained(folder).model for folder in (model, tmp_path / "out"))
    for before, after in plan.renumbered.items():
        same = torch.equal(old.layers[before].mlp.down_proj.weight, new.layers[after].mlp.down_proj.weight)
        assert same == (before != first)


@pytest.mark.parametrize("tied", [True, False])
def test_partial_finetuning_trains_the_end_and_nothing_else(tied, tiny_checkpoints, tiny_text_file, tmp_path):
    model = deep(tiny_checkpoints, tie_word_embeddings=tied)
    overrides = {"depth.drop": 1, "calibration.samples": 32, **TRAINING}
    compress(model, tmp_path / "out", tiny_text_file, "partial-finetune", **overrides)
    record = json.loads((tmp_path / "out" / "lrc.json").read_text())["depth"]["repair"]
    assert record["accepted"] and record["loss"] < 0.9 * record["loss_without"] and record["layers"] == [1, 2, 3]
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    assert torch.equal(old.model.embed_tokens.weight, new.model.embed_tokens.weight)
    assert torch.equal(old.model.layers[0].mlp.up_proj.weight, new.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(old.model.layers[3].mlp.up_proj.weight, new.model.layers[3].mlp.up_proj.weight)
    assert not torch.equal(old.model.norm.weight, new.model.norm.weight)
    assert torch.equal(old.lm_head.weight, new.lm_head.weight) == tied


# --- what is asked wrongly, and what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"depth.repair": "linear-pach"}, RecipeError, "Did you mean 'linear-patch'"),
        ({"depth.granularity": "sub-layer"}, RecipeError, "goes with finercut, sleb"),
        ({"depth.granularity": "sub-layer", "depth.score": "sleb", "depth.repair": "linear-map"}, RecipeError, "whole layers"),
        ({"depth.repair": "streamline"}, RecipeError, "take score angular, angular-all, last"),
        ({"depth.repair": "linear-patch", "depth.damping": 0.1}, RecipeError, "repair linear-patch has no use for damping"),
        ({"depth.damping": 0.1}, RecipeError, "no use for damping; those by least squares do: linear-map, replace-me"),
        ({"depth.repair": "linear-map", "depth.training.lr": 1e-3}, RecipeError, "training is of a trained repair"),
        ({"depth.drop": 1, "ratio": 0.3}, RecipeError, "leave out either"),
        (
            {"depth.score": "sleb", "depth.granularity": "sub-layer", "depth.ratio": 0.5},
            BudgetError,
            r"2 of 6 sub-layers \(33%\)",
        ),
        ({"depth.score": "last", "depth.repair": "streamline", "depth.drop": 1}, BudgetError, "one of which is to stand in"),
    ],
)
def test_mistakes_are_named(overrides, error, message, tiny_checkpoints):
    with pytest.raises(error, match=message):
        make_draft(ModelView(locate(str(tiny_checkpoints("llama")))), load_recipe("block-influence", overrides))


def test_the_plan_says_what_it_will_take_and_the_result_what_it_brought(tiny_checkpoints, tiny_text_file, tmp_path):
    model = deep(tiny_checkpoints)
    source = ["--calibration", f"text:{tiny_text_file}", "--samples", "32", "--length", "32"]
    plan = run_lrc("plan", model, "--recipe", "sleb", "--ratio", "0.3", *source).out
    assert "some 2 rounds, 5 models, each over 256 tokens" in plan
    plan = run_lrc("plan", model, "--recipe", "streamline", "--ratio", "0.3", *source).out
    assert "trains one layer (20,832 numbers) for up to 4 epochs of 1,024 tokens" in plan
    plan = run_lrc("plan", model, "--recipe", "finercut", "--ratio", "0.3", *source).out
    assert "the result needs lrc to load" in plan and "sub-layers:" in plan
    made = run_lrc("compress", model, "--recipe", "replace-me", "--ratio", "0.3", *source, "--out", tmp_path / "out")
    assert made.code == 0, made.err
    assert "repair replace-me: held-out loss" in made.err
    assert "linear-patch" in run_lrc("recipe", "scores").out
