"""Blocks trained towards the original's outputs, on the real path."""

from __future__ import annotations

import hashlib

import pytest
import torch
from pipeline import compress

from lrc.calibrate.data import load_calibration
from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.run.pipeline import carry_out
from lrc.run.verify import verify

REFINE = {"block": {"lr": 3e-3, "epochs": 3, "batch_tokens": 96}}
OPTIONS = {"ratio": 0.5, "samples": 60, "calibration__held_out": 8}


def records(folder) -> list[dict]:
    import json

    return list(json.loads((folder / "lrc.json").read_text())["layers"].values())


@pytest.mark.parametrize(("family", "propagate"), [("llama", "original"), ("gpt2", "compressed")])
def test_blocks_come_closer_to_the_original_and_load_back(family, propagate, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints(family)
    plain = compress(model, tmp_path / "plain", tiny_text_file, propagate=propagate, **OPTIONS)
    refined = compress(model, tmp_path / "refined", tiny_text_file, propagate=propagate, refine=REFINE, **OPTIONS)
    verify(tmp_path / "refined")
    assert plain.whole_after == refined.whole_after
    done = [record["refinement"] for record in records(tmp_path / "refined")]
    assert all(each["best"] <= each["start"] for each in done) and done[-1]["best"] < 0.98 * done[-1]["start"]
    tokens = load_calibration(refined.recipe.calibration, ModelView(locate(str(model))).location.tokenizer()).held_out
    with torch.no_grad():
        true, one, two = (open_model(str(p))[0](tokens).logits for p in (model, tmp_path / "plain", tmp_path / "refined"))
    assert float((true - two).square().mean()) < float((true - one).square().mean())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("more", [{"refine": REFINE}, {"refine": REFINE, "propagate": "compressed"}])
def test_a_killed_run_goes_on_to_the_same_bytes(more, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama")
    compress(model, tmp_path / "whole", tiny_text_file, **more, **OPTIONS)
    wanted = {"calibration.source": f"text:{tiny_text_file}", "calibration.samples": 60, "calibration.length": 48,
              "calibration.held_out": 8, "ratio": 0.5} | more  # fmt: skip
    for turn in (1, 2):
        view = ModelView(locate(str(model)))
        draft = make_draft(view, load_recipe("svd-llm", wanted))
        texts = load_calibration(draft.recipe.calibration, view.location.tokenizer())

        def kill(report, turn=turn):
            if turn == 1 and report.stage == "layer" and report.done == 2:
                raise Killed

        if turn == 1:
            with pytest.raises(Killed):
                carry_out(draft, view, texts, tmp_path / "out", notify=kill)
        else:
            carry_out(draft, view, texts, tmp_path / "out", notify=kill)
    found = [{p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / name).glob("*.safetensors")}
             for name in ("whole", "out")]  # fmt: skip
    assert found[0] == found[1]
