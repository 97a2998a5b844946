"""Two streams: matrices corrected for the inputs that they will see, and blocks refined against the original's outputs."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from pipeline import compress

from lrc.calibrate.data import load_calibration
from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.errors import RecipeError
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.refine.correction import regressed
from lrc.run.pipeline import carry_out
from lrc.run.verify import verify

REFINE = {"block": {"lr": 3e-3, "epochs": 3, "batch_tokens": 96}}
OPTIONS = {"ratio": 0.5, "samples": 60, "calibration__held_out": 8}


def problem(tokens: int = 400):
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(7, 10)), rng.normal(size=(tokens, 10)) * np.logspace(-1, 1, 10)
    return weight, x, x + 0.3 * rng.normal(size=x.shape) + 0.2 * x[:, ::-1]


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_a_corrected_matrix_is_the_least_squares_map_from_the_inputs_it_sees(beta):
    weight, x, seen = problem()
    wanted = (seen + beta * (x - seen)) @ weight.T
    expected = np.linalg.lstsq(seen, wanted, rcond=None)[0].T
    gram, cross = (torch.tensor(m / len(x)) for m in (seen.T @ seen, (x - seen).T @ seen))
    found = regressed(torch.tensor(weight), gram, cross, beta, 1e-12)
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_a_singular_gram_and_inputs_that_did_not_change_leave_the_matrix_as_it_is():
    weight, x, seen = (torch.tensor(m) for m in problem(tokens=4))
    gram = seen.T @ seen / 4
    assert torch.isfinite(regressed(weight, gram, (x - seen).T @ seen / 4, 1.0, 0.01)).all()
    assert torch.allclose(regressed(weight, gram, torch.zeros_like(gram), 1.0, 0.01), weight)
    assert torch.equal(regressed(weight, torch.zeros_like(gram), torch.zeros_like(gram), 1.0, 0.01), weight)


def records(folder) -> list[dict]:
    import json

    return list(json.loads((folder / "lrc.json").read_text())["layers"].values())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_correction_is_taken_only_where_held_out_error_falls(family, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints(family)
    for name, more in (("plain", {}), ("corrected", {"correction": {"betas": [0.5, 1.0]}})):
        compress(model, tmp_path / name, tiny_text_file, propagate="compressed", keep=["*.0.*"], **more, **OPTIONS)
    verify(tmp_path / "corrected")
    taken = [record["correction"]["beta"] for record in records(tmp_path / "corrected")]
    assert taken[0] is None  # the first layer sees what the original saw
    assert set(taken) <= {None, 0.5, 1.0} and any(beta is not None for beta in taken)
    ids = torch.arange(3, 40)[None]
    logits = [open_model(str(path))[0](ids).logits.detach() for path in (model, tmp_path / "plain", tmp_path / "corrected")]
    assert not torch.equal(logits[1], logits[2])


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


@pytest.mark.parametrize("more", [{"refine": REFINE}, {"correction": {}, "propagate": "compressed"}])
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


def test_what_does_not_go_together_is_said():
    with pytest.raises(RecipeError, match="propagate: compressed"):
        load_recipe("svd-llm", {"correction": {}, "calibration.held_out": 2})
    with pytest.raises(RecipeError, match=r"must lie in \(0, 1\], not 2"):
        load_recipe("svd-llm", {"correction": {"betas": [2]}, "calibration.held_out": 2, "propagate": "compressed"})
