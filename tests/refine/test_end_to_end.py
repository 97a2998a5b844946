"""Refinement as the last step of a run: closer to the original on held-out text, the same bytes, and it survives a kill."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from pipeline import compress
from tiny import CONFIGS, tiny_model

import lrc.checkpoint.artifact
import lrc.refine.end_to_end
from lrc.calibrate.data import load_calibration
from lrc.checkpoint.artifact import Artifact
from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.errors import RecipeError
from lrc.model.events import Event
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.refine.end_to_end import from_hidden
from lrc.run.pipeline import carry_out
from lrc.run.run import STATISTICS
from lrc.run.verify import verify

REFINE = {"end-to-end": {"lr": 1e-3, "steps": 60, "every": 15, "batch_tokens": 96}}
OPTIONS = {"ratio": 0.5, "samples": 100, "calibration__held_out": 4}


def divergence(original, folder, ids) -> float:
    logs = []
    for path in (original, folder):
        with torch.no_grad():
            logs.append(open_model(str(path))[0](ids).logits.double().log_softmax(-1))
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def hashes(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_from_hidden_states_are_the_models_own(family):
    model, ids = tiny_model(family), torch.arange(3, 40)[None]
    with torch.no_grad():
        decoder = model.get_submodule(model.base_model_prefix)
        hidden = decoder(input_ids=ids).last_hidden_state
        assert torch.equal(from_hidden(model, ids, hidden), model(ids).logits)
        assert torch.equal(model(ids).logits, from_hidden(model, ids, hidden))  # and the decoder is itself again


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_refined_model_is_closer_to_the_original_in_the_same_bytes(family, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints(family)
    plain = compress(model, tmp_path / "plain", tiny_text_file, **OPTIONS)
    refined = compress(model, tmp_path / "refined", tiny_text_file, refine=REFINE, **OPTIONS)
    record = verify(tmp_path / "refined")
    assert plain.whole_after == refined.whole_after
    tokens = load_calibration(refined.recipe.calibration, ModelView(locate(str(model))).location.tokenizer()).held_out
    before, after = (divergence(model, tmp_path / name, tokens) for name in ("plain", "refined"))
    assert after < 0.95 * before
    assert record["refinement"]["start"] == pytest.approx(before, rel=1e-3)
    assert record["refinement"]["best"] == pytest.approx(after, rel=1e-3)
    assert not (tmp_path / "refined" / STATISTICS).exists()


def test_quantized_targets_train_their_scales(tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama", dtype=torch.bfloat16)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: gptq\nsettings: {bits: 2, group_size: 16}\n")
    options = {key: value for key, value in OPTIONS.items() if key != "ratio"}
    compress(model, tmp_path / "out", tiny_text_file, str(recipe), refine=REFINE, **options)
    record = verify(tmp_path / "out")["refinement"]
    assert record["best"] < 0.95 * record["start"] and record["parameters"] > 0


class Killed(BaseException):
    pass


@pytest.mark.parametrize("look", [2, 4])
def test_a_killed_refinement_goes_on_to_the_same_bytes(look, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama", dtype=torch.bfloat16)
    compress(model, tmp_path / "whole", tiny_text_file, refine=REFINE, **OPTIONS)
    wanted = {"calibration.source": f"text:{tiny_text_file}", "calibration.samples": 100, "calibration.length": 48,
              "calibration.held_out": 4, "ratio": 0.5, "refine": REFINE}  # fmt: skip
    view = ModelView(locate(str(model)))
    draft = make_draft(view, load_recipe("svd-llm", wanted))
    texts = load_calibration(draft.recipe.calibration, view.location.tokenizer())
    seen: list[int] = []

    def kill(event: Event) -> None:
        if event.stage == "refinement":
            seen.append(event.done)
            assert event.total == 4
            if len(seen) == look:
                raise Killed

    with pytest.raises(Killed):
        carry_out(draft, view, texts, tmp_path / "out", notify=kill)
    assert not (tmp_path / "out" / "config.json").exists()
    view = ModelView(locate(str(model)))
    carry_out(draft, view, texts, tmp_path / "out", notify=kill)
    assert seen == [*range(1, look + 1), *range(look, 5)]  # the state is put down after the look that was interrupted
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    one, two = (json.loads((tmp_path / name / "lrc.json").read_text()) for name in ("out", "whole"))
    assert one["refinement"] == two["refinement"]


@pytest.mark.parametrize("recipe", ["svd-llm-sequential", "svd-llm+gptq"])
@pytest.mark.parametrize("moment", ["before the journal", "after the renaming"])
def test_killed_between_two_shards_that_are_written_again(
    recipe, moment, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch
):
    """At every moment each of them is finished, the old one or the new one, and what is recorded of it does not change."""
    model = tiny_checkpoints("llama")
    refine = {"end-to-end": {"lr": 1e-3, "steps": 4, "every": 2, "batch_tokens": 96}}
    options = {"ratio": 0.7, "samples": 12, "calibration__held_out": 4, "refine": refine}
    compress(model, tmp_path / "whole", tiny_text_file, recipe, **options)
    seen: list[str] = []
    place, name = (Artifact, "_append") if moment == "before the journal" else (lrc.checkpoint.artifact, "sync_folder")
    before = getattr(place, name)

    def killed_in_the_second(*arguments: object) -> object:
        if not inside:
            return before(*arguments)
        seen.append(name)
        if len(seen) == 2:
            raise Killed
        return before(*arguments)

    inside: list[bool] = []
    refined = lrc.refine.end_to_end.Distillation.run

    def run(*arguments: object) -> object:
        found = refined(*arguments)
        inside.append(True)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(lrc.refine.end_to_end.Distillation, "run", run)
        patched.setattr(place, name, killed_in_the_second)
        with pytest.raises(Killed):
            compress(model, tmp_path / "out", tiny_text_file, recipe, **options)
    compress(model, tmp_path / "out", tiny_text_file, recipe, **options)
    for file in ("lrc.json", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_experts_that_no_token_reaches_are_no_obstacle(tiny_checkpoints, tiny_text_file, tmp_path):
    """Of 48 experts most see nothing before the first look."""
    model = tiny_checkpoints("mixtral", num_local_experts=48)
    for number, refine in enumerate(({"block": {"epochs": 2, "batch_tokens": 64}}, {"end-to-end": {"steps": 2, "every": 1}})):
        options = {"samples": 2, "length": 32, "calibration__held_out": 1, "ratio": 0.3, "refine": refine}
        compress(model, tmp_path / str(number), tiny_text_file, "svd", **options)
        assert verify(tmp_path / str(number))


def test_what_is_missing_is_said():
    with pytest.raises(RecipeError, match=r"calibration\.held_out: 4"):
        load_recipe("svd-llm", {"refine": "end-to-end"})
    with pytest.raises(RecipeError, match="stpes"):
        load_recipe("svd-llm", {"refine": {"end-to-end": {"stpes": 3}}, "calibration.held_out": 2})
    both = load_recipe("svd-llm", {"refine": ["block", "end-to-end"], "calibration.held_out": 2})
    assert both.refine.block is not None and both.refine.end_to_end is not None
