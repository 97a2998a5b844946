"""What may be asked of methods that solve several targets together: what is kept or dropped beside them, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from pipeline import compress, logits
from safetensors.torch import load_file

from lrc.errors import BudgetError, RecipeError
from lrc.plan.load_recipe import load_recipe
from lrc.run.verify import verify


def test_kept_members_leave_the_others_to_share(tiny_checkpoints, tiny_text_file, tmp_path):
    plan = compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "shared-input", ratio=0.3,
                    keep=["*.q_proj", "model.layers.1.mlp.up_proj"])  # fmt: skip
    forms = {entry["name"]: entry["form"] for entry in verify(tmp_path / "out")["targets"]}
    assert forms["model.layers.0.self_attn.q_proj"]["kind"] == "dense"
    assert forms["model.layers.0.self_attn.v_proj"]["owner"] == "model.layers.0.self_attn.k_proj"
    assert forms["model.layers.1.mlp.gate_proj"]["kind"] == "low-rank"  # alone with its input now
    assert plan.whole_after == sum(
        tensor.numel() * 4 for shard in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(shard).values()
    )


def test_sets_within_a_layer_go_with_dropped_layers(tiny_checkpoints, tiny_text_file, tmp_path):
    """A later layer moves up, and the owner that its forms name moves with it."""
    depth = {"score": "last", "drop": 1, "protect_last": 1}
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "shared-input", ratio=0.5, depth=depth)
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    owners = {name: spec["owner"] for name, spec in modules.items() if "owner" in spec}
    assert owners and all(name.split(".")[2] == owner.split(".")[2] for name, owner in owners.items())
    assert max(int(name.split(".")[2]) for name in owners) == 1
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"propagate": "compressed"}, "needs 'propagate: original'"),
        ({"depth": {"score": "last", "drop": 1}}, "drop layers in a run of its own"),
        ({"refine": "block", "calibration.held_out": 2}, "use refine: end-to-end"),
        ({"settings": {"layers": 1}}, "greater than or equal to 2"),
        ({"settings": {"roles": "*q_proj"}}, "write a list of patterns"),
        ({"settings": {"layer": 3}}, "Did you mean 'layers'"),
    ],
)
def test_what_cannot_be_joined_is_refused(overrides, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe("basis-sharing", overrides)


@pytest.mark.parametrize(
    ("together", "words"),
    [("steps:", "solves several targets at once"), ("allocation: spectrum\nalternatives:", "shares factors among targets")],
)
def test_what_shares_factors_is_no_step_and_no_alternative(together, words, tmp_path):
    (tmp_path / "r.yaml").write_text(f"{together}\n- method: shared-input\n- method: gptq\n  settings: {{bits: 4}}\n")
    with pytest.raises(RecipeError, match=f"shared-input {words}"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_a_typo_in_a_role_is_helped(tiny_checkpoints, tiny_text_file, tmp_path):
    with pytest.raises(RecipeError, match=r"'self_attn.q_porj' is the role of no open target.*[\s\S]*self_attn.q_proj"):
        compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "basis-sharing", ratio=0.3,
                 settings__roles=["self_attn.q_porj", "*up_proj"])  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_ratio_that_no_set_can_meet_says_so(tiny_checkpoints, tiny_text_file, tmp_path):
    with pytest.raises(BudgetError, match="no form that is small enough"):
        compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "shared-input", ratio=0.99)
