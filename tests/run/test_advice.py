"""`lrc advise`: plans and trials on tiny models; what it predicts is what the real pipeline measures on the same layers."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from commandline import run_lrc
from transformers import AutoModelForCausalLM

import lrc
from lrc.calibrate.data import CalibrationSpec, load_calibration
from lrc.checkpoint.location import Location
from lrc.model.view import ModelView
from lrc.run.advice import advice
from lrc.run.advice.advice import Trial, picks
from lrc.run.advice.candidates import candidates, sampled_layers, trial_recipe
from lrc.run.advice.measure import Measured


def advised(model: Path, text: Path, *flags: object) -> dict:
    done = run_lrc(
        "advise", model, "--calibration", f"text:{text}", "--samples", 4, "--length", 48, "--layers", 2, "--json", "-", *flags
    )
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.fixture(scope="module")
def told(tiny_checkpoints, tiny_text_file) -> dict:
    """The answer for a tiny Llama of four layers, three recipes."""
    model = tiny_checkpoints("llama", num_hidden_layers=4)
    return advised(model, tiny_text_file, "--ratio", 0.4, "--recipes", "gptq,svd-llm,svd")


def test_the_least_loss_comes_first_and_every_command_is_one_that_lrc_takes(told, tiny_checkpoints):
    losses = [row["predicted_nats"] for row in told["tried"]]
    assert losses == sorted(losses) and next(row["recipe"] for row in told["tried"]) == "gptq"
    assert told["picks"][0]["recipe"] == "gptq" and {row["holds"] for row in told["picks"]} == {"codes", "16-bit numbers"}
    model = str(tiny_checkpoints("llama", num_hidden_layers=4))
    for row in told["picks"]:
        words = shlex.split(row["command"])
        assert words[:3] == ["lrc", "compress", model] and words[3:5] == ["--recipe", row["recipe"]]
        planned = run_lrc("plan", *words[2:], "--json", "-")
        assert planned.code == 0, planned.err
        draft = lrc.plan(model, row["recipe"], ratio=0.4)
        assert (row["bytes"], row["ratio"]) == (draft.whole_after, draft.ratio)


def test_the_loss_of_a_trial_is_that_of_whole_models_in_float64(told, tiny_checkpoints, tiny_text_file, tmp_path):
    """svd needs no text: the real pipeline on the same layers gives the same checkpoint, which transformers opens."""
    model = tiny_checkpoints("llama", num_hidden_layers=4)
    dense = [f"model.layers.{layer}.*" for layer in (0, 2)]
    lrc.compress(model, "svd", out=tmp_path / "out", ratio=0.4, keep=dense)
    spec = CalibrationSpec(source=f"text:{tiny_text_file}", samples=4, length=48, held_out=4)
    windows = load_calibration(spec, Location("it", model).tokenizer()).held_out
    one, other = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float64)(windows).logits[:, :-1].log_softmax(-1)
        for each in (model, tmp_path / "out")
    )
    far = float((one.exp() * (one - other)).sum(-1).mean())
    (row,) = [row for row in told["tried"] if row["recipe"] == "svd"]
    assert row["measured"]["divergence"] == pytest.approx(far, rel=1e-3)
    after = float(-other.gather(-1, windows[:, 1:, None]).mean())
    assert row["measured"]["after"] == pytest.approx(after, rel=1e-4)
    assert row["factor"] == pytest.approx(2) and row["predicted_nats"] == row["measured"]["divergence"] * row["factor"]
    assert row["layers_tried"] == 2 and row["measured"]["tokens"] == 4 * 47


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("amount", [{"ratio": 0.4}, {"size": None}])
def test_a_trial_takes_the_share_that_the_plan_takes(family, amount, tiny_checkpoints):
    view = ModelView(Location("it", tiny_checkpoints(family)))
    if "size" in amount:
        amount = {"size": f"{int(0.8 * view.nbytes)}B"}
    found, refused = candidates(view, ["svd-llm", "gptq", "lrc-fast", "narrow"], amount, [torch.device("cpu")])
    assert [each.name for each in found] == ["svd-llm", "gptq", "lrc-fast", "narrow"] and not refused
    layers = sampled_layers(view, 1)
    assert layers == [1]
    for each in found:
        recipe = trial_recipe(each, view, layers, each.recipe.calibration)
        draft = advice.make_draft(view, recipe)
        open_now = [step for step in draft.steps if step.target.layer == 1 and not step.kept]
        assert all(step.choice.dense for step in draft.steps if step.target.layer != 1)
        if each.recipe.allocation == "uniform":
            plan = {step.target.name: step.choice for step in each.draft.steps}
            for step in open_now:
                assert step.choice == plan[step.target.name] or abs(step.choice.rank - plan[step.target.name].rank) <= 1
        else:  # its budget is for all targets: what the open ones lose of theirs is what the plan takes of each
            lost = recipe.ratio * draft.targets_before / sum(step.bytes_before for step in open_now)
            assert lost == pytest.approx(each.draft.ratio, abs=0.02)


def test_a_size_and_a_memory_that_leave_something_out(tiny_checkpoints, tiny_text_file):
    model = tiny_checkpoints("mixtral")
    told = advised(model, tiny_text_file, "--size", "250kB", "--recipes", "svd-llm,rtn,narrow")
    assert "narrow" in told["refused"] and told["picks"][0]["command"].split()[5:7] == ["--size", "250kB"]
    assert all(row["bytes"] <= 250_000 for row in told["tried"])
    view = ModelView(Location("it", model))
    from lrc.run.advice.memory import cache_bytes, size_for

    assert cache_bytes(view, 100) == 2 * 100 * 3 * 2 * 16 * 4
    resident = advice_memory()
    size = size_for(view, resident + 600_000, 10)
    assert 0 < size < 600_000 - cache_bytes(view, 10)
    for memory, said in ((10**6, "leaves nothing"), (10**12, "fits as it is")):
        done = run_lrc("advise", model, "--memory", f"{memory}B", "--calibration", f"text:{tiny_text_file}", "--length", 48)
        assert done.code == 2 and said in done.err and done.out == ""


def advice_memory() -> int:
    from lrc.model.machine.host_memory import resident

    return resident()


def trial(name: str, kind: str, nats: float) -> Trial:
    class Fixed:
        pass

    fixed = Fixed()
    fixed.name, fixed.kind = name, kind
    return Trial(fixed, Measured(nats, 1.0, 1.0 + nats, 10), 1, 1.0, 0.0)


def test_picks_are_the_least_loss_and_one_of_each_other_kind():
    codes, numbers, plain = "codes", "16-bit numbers", "plain checkpoint"
    rows = [trial("a", codes, 0.1), trial("b", codes, 0.2), trial("c", numbers, 0.3), trial("d", plain, 0.4)]
    assert [pick.trial.candidate.name for pick in picks(rows)] == ["a", "c", "d"]
    assert [pick.trial.candidate.name for pick in picks(rows[:2])] == ["a", "b"]
    assert [pick.trial.candidate.name for pick in picks([rows[0], trial("x", plain, 9.0)])] == ["a"]
    assert [pick.trial.candidate.name for pick in picks([trial("x", plain, 9.0)])] == ["x"] and picks([]) == []
    assert trial("x", plain, 30.0).times == math.inf


def test_what_it_prints_names_commands_doubts_and_what_was_not_tried(tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(advice.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    done = run_lrc("advise", tiny_checkpoints("gpt2"), "--ratio", 0.4, "--layers", 1, "--recipes", "svd,block-influence",
                   "--calibration", f"text:{tiny_text_file}", "--samples", 2, "--length", 32)  # fmt: skip
    assert done.code == 0, done.err
    assert "1. svd: the least predicted loss" in done.out and "lrc compress" in done.out and "Not known:" in done.out
    assert "block-influence: depth: 2 of 3 layers shall go" in done.out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.out)
    lines = [line for line in plain.splitlines() if "lrc compress" not in line and "tiny.txt" not in line]
    assert max(map(len, lines)) <= 80
    assert list(tmp_path.iterdir()) == []  # trials are deleted
