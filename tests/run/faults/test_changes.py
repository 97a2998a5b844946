"""Has anything changed? What a result depends on is compared, every byte of it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import contents, lrc_ok, run_lrc, untouched
from safetensors.torch import load_file, save_file

from lrc.calibrate.data import load_calibration
from lrc.checkpoint.artifact import Artifact
from lrc.checkpoint.atomic import signed_json
from lrc.checkpoint.folder import JOURNAL
from lrc.checkpoint.location import locate
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft


def negated(model: Path) -> None:
    """Two matrices in the middle of their shards change sign; names, sizes and times stay."""
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        (shard,) = [path for path in model.glob("*.safetensors") if name in load_file(path)]
        times, tensors = shard.stat(), load_file(shard)
        tensors[name] = -tensors[name]
        save_file(tensors, shard, {"format": "pt"})
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


def larger_epsilon(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def other_template(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages }}"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [(negated, "model.fingerprint: it has"), (larger_epsilon, "model.config: it has"), (other_template, "model.files: it has")],
)
def test_a_finished_result_of_a_model_that_changed_is_not_this_result(change, said, damaged, request_for, tmp_path):
    command = request_for(damaged, tmp_path / "out")
    lrc_ok(*command)
    before = untouched(tmp_path / "out")
    change(damaged)
    refused = run_lrc(*command)
    assert refused.code == 2 and said in refused.told and refused.told.count("it has") == 1
    assert untouched(tmp_path / "out") == before


@pytest.mark.parametrize("change", [negated, larger_epsilon])
@pytest.mark.parametrize("recipe", ["lrc-fast", pytest.param("sleb", marks=pytest.mark.slow)])
def test_statistics_and_losses_of_a_model_that_changed_are_not_used(change, recipe, damaged, request_for, tmp_path):
    def compress(out: str, *more: object) -> dict[str, str]:
        told = request_for(damaged, tmp_path / out, "--recipe", recipe, *more)
        if recipe == "sleb":
            told += ["--set", "depth={score: sleb, drop: 1, protect_first: 0, protect_last: 0}"]
            told[told.index("--ratio") : told.index("--ratio") + 2] = []
        lrc_ok(*told)
        return contents(tmp_path / out)  # lrc.json has the losses

    shared = ("--statistics", tmp_path / "statistics")
    before = compress("before", *shared)
    change(damaged)
    after = compress("after", *shared)
    assert after == compress("alone") and after != before


def test_held_out_tokens_belong_to_a_request(tiny_checkpoints, tiny_text_file):
    view = ModelView(locate(str(tiny_checkpoints("llama"))))
    told = {"ratio": 0.3, "calibration.source": f"text:{tiny_text_file}", "calibration.samples": 4, "calibration.length": 32}
    draft = make_draft(view, load_recipe("svd-llm", told | {"calibration.held_out": 2}))
    calibration = load_calibration(draft.recipe.calibration, view.location.tokenizer())
    other = dataclasses.replace(calibration, held_out=torch.flip(calibration.held_out, [1]))
    assert draft.identity(view.identity(), calibration) != draft.identity(view.identity(), other)


@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_folder_of_an_lrc_that_compared_less_says_so(state, damaged, request_for, tmp_path):
    out, command = tmp_path / "out", request_for(damaged, tmp_path / "out")
    lrc_ok(*command)
    if state == "finished":
        record = json.loads((out / "lrc.json").read_text())
        record["identity"].pop("version")
        (out / "lrc.json").write_bytes(signed_json(record))
    else:
        (out / "config.json").unlink()
        (out / JOURNAL).write_text(json.dumps({"identity": {"model": {"fingerprint": "0" * 64}}}) + "\n")
    refused = run_lrc(*command)
    assert refused.code == 2 and "another version of lrc" in refused.err and "--restart" in refused.err
    lrc_ok(*command, "--restart")


@pytest.mark.parametrize("when", [0, 4_102_444_800])
def test_times_in_the_past_and_in_the_future_change_nothing(when, damaged, request_for, uninterrupted, half_a_run, tmp_path):
    out = half_a_run(damaged, tmp_path / "out")
    for folder in (damaged, out):
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (when, when))
    assert "finished earlier" in lrc_ok(*request_for(damaged, out))
    made, expected = contents(out), uninterrupted()
    assert made.keys() == expected.keys()
    assert all(made[name] == expected[name] for name in made if name not in ("lrc.json", "README.md"))  # which name the model


@pytest.fixture
def half_a_run(request_for, monkeypatch) -> Callable[[Path, Path], Path]:
    """A function that interrupts a run after its first layer."""

    def run(model: Path, out: Path) -> Path:
        real = Artifact.write

        def write(self: Artifact, key: str, *rest: object) -> object:
            if self.done:
                raise KeyboardInterrupt
            return real(self, key, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(Artifact, "write", write)
            assert run_lrc(*request_for(model, out)).code == 130
        return out

    return run
