"""Sub-layers of layers, found without names, and models that lack some of them."""

from __future__ import annotations

import json

import pytest
import torch
from shallow import IDS, compress, deep, logits
from stock import logits_without_lrc

from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.errors import ModelError
from lrc.model.sublayers import require_sublayers, sublayers_of
from lrc.model.view import ModelView
from lrc.run.verify import verify

SUBLAYERS = {
    "llama": (["self_attn", "mlp"], ["self_attn.o_proj", "mlp.down_proj"]),
    "gemma3_text": (["self_attn", "mlp"], [None, None]),
    "gpt2": (["attn", "mlp"], ["attn.c_proj", "mlp.c_proj"]),
    "opt": (["self_attn", "fc2"], ["self_attn.out_proj", "fc2"]),
    "gpt_neox": (["attention", "mlp"], ["attention.dense", "mlp.dense_4h_to_h"]),
    "mixtral": (["self_attn", "mlp.experts"], ["self_attn.o_proj", None]),
}


@pytest.mark.parametrize("family", SUBLAYERS)
def test_sublayers_are_found_without_names(family, tiny_checkpoints):
    view = ModelView(locate(str(tiny_checkpoints(family))))
    found = sublayers_of(view, view.targets)
    assert sorted(found) == [0, 1, 2]
    for layer, sublayers in found.items():
        prefix = f"{view.layer_names[layer]}."
        assert [sublayer.name.removeprefix(prefix) for sublayer in sublayers] == SUBLAYERS[family][0]
        assert [sublayer.last and sublayer.last.role for sublayer in sublayers] == SUBLAYERS[family][1]
        assert [t for sublayer in sublayers for t in sublayer.targets] == [t for t in view.targets if t.layer == layer]
        assert all(abs(sublayer.scale - 1) < 1e-5 and sublayer.vanishes for sublayer in sublayers)
    assert all(p.is_meta for layer in view.layers for p in layer.parameters()), "the layer that was looked at went again"


def test_a_sublayer_that_is_scaled_on_its_way_is_one(tiny_checkpoints):
    model = tiny_checkpoints("llama", num_hidden_layers=2)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "residual_multiplier": 0.25}
    other = model.parent / f"{model.name}-granite"
    other.mkdir(exist_ok=True)
    for file in model.iterdir():
        if not (other / file.name).exists():
            (other / file.name).symlink_to(file)
    (other / "config.json").unlink()
    (other / "config.json").write_text(json.dumps(config))
    view = ModelView(locate(str(other)))
    sublayers = sublayers_of(view, view.targets)[1]
    assert [sublayer.scale for sublayer in sublayers] == pytest.approx([0.25, 0.25], rel=1e-4)


def test_layers_that_are_no_sum_of_sublayers_are_refused(tiny_checkpoints):
    view = ModelView(locate(str(tiny_checkpoints("opt", do_layer_norm_before=False))))
    with pytest.raises(ModelError, match="granularity: layer"):
        require_sublayers(view, view.targets)


# --- sub-layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUBLAYERS)
def test_sublayers_are_removed_and_the_rest_computes_what_it_did(family, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints(family)
    overrides = {"depth.drop": 3, "depth.protect_first": 0, "depth.protect_last": 0}
    plan, _ = compress(model, tmp_path / "out", tiny_text_file, "finercut", **overrides)
    removed = plan.model_edit.removed
    assert len(removed) == 3 and not plan.dropped
    gone = sum(step.bytes_before for step in plan.steps if step.target in plan.model_edit.zeroed)
    assert gone == plan.targets_before - plan.targets_after > 0
    record = verify(tmp_path / "out")  # bytes on disk are what the plan said
    assert record["depth"]["removed"] == list(removed)
    # the original, its sub-layers' modules putting out zeros by hand
    original = open_model(str(model))[0]
    view = ModelView(locate(str(model)))
    tails = {sublayer.name: f"{view.layer_names[sublayer.layer]}.{sublayer.tail}" for sublayer in view.sublayers}

    def nothing(module, args, output):
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    for name in removed:
        original.get_submodule(tails[name]).register_forward_hook(nothing)
    with torch.no_grad():
        assert torch.allclose(logits(tmp_path / "out"), original(IDS).logits, atol=1e-5)


def test_sublayers_are_removed_until_the_ratio_is_met_and_the_rest_is_compressed(tiny_checkpoints, tiny_text_file, tmp_path):
    model = deep(tiny_checkpoints)
    plan, _ = compress(model, tmp_path / "out", tiny_text_file, "finercut", ratio=0.3)
    most = max(sum(t.numel for t in b.targets) for b in ModelView(locate(str(model))).sublayers)
    assert 0.3 <= plan.ratio < 0.3 + most / sum(step.target.numel for step in plan.steps)
    both = {"method": "svd-llm", "depth.drop": 2, "ratio": 0.5}
    plan, _ = compress(model, tmp_path / "both", tiny_text_file, "finercut", **both)
    assert 0.5 <= plan.ratio < 0.56 and len(plan.model_edit.removed) == 2
    record = json.loads((tmp_path / "both" / "lrc.json").read_text())
    kinds = {target["name"]: target["form"]["kind"] for target in record["targets"]}
    assert {name for name, kind in kinds.items() if kind == "zero"} == {t.name for t in plan.model_edit.zeroed}
    assert "low-rank" in kinds.values()
    assert torch.isfinite(logits(tmp_path / "both")).all()


def test_without_lrc_a_model_that_needs_it_fails_aloud(tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints("llama"), tmp_path / "half", tiny_text_file, "finercut", **{"depth.drop": 1})
    done = logits_without_lrc(tmp_path / "half", tmp_path / "logits.pt")
    assert done.returncode != 0 and "compressed by lrc" in done.stderr + done.stdout
