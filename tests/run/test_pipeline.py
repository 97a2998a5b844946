"""The whole pipeline: what it promises beside what every method does on every architecture (test_matrix.py)."""

from __future__ import annotations

import json
import os
import re
import stat
import textwrap

import pytest
import torch
from commandline import lrc_ok
from pipeline import IDS, compress, logits, place_of, stored
from safetensors.torch import load_file

from lrc.checkpoint.hf_quantizer import open_model
from lrc.run.verify import verify


def multiplied_out(model, record, tensors) -> torch.Tensor:
    """Logits of the original model with each target's weight replaced by left @ right."""
    original, _ = open_model(str(model))
    with torch.no_grad():
        for target in record["targets"]:
            stored, place = place_of(original, target["name"])
            place.copy_(tensors[f"{stored}.left"] @ tensors[f"{stored}.weight"])
        return original(IDS).logits


def test_factored_experts_multiply_as_the_experts_multiplied_out(tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("mixtral")
    plan = compress(model, tmp_path / "out", tiny_text_file, ratio=0.3)
    record = verify(tmp_path / "out")
    # bytes on disk are what the plan said, header aside
    tensors = {k: v for shard in record["shards"] for k, v in load_file(tmp_path / "out" / shard).items()}
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == plan.whole_after
    assert 0.29 <= plan.ratio <= 0.36
    assert all(0 < target["error"] < 1 for target in record["targets"])
    # the same logits as the original model with every target multiplied out and put in its place
    assert torch.allclose(logits(tmp_path / "out"), multiplied_out(model, record, tensors), atol=1e-4)
    assert not torch.allclose(logits(tmp_path / "out"), logits(model), atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_ratio_zero_is_the_original(family, tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints(family)
    plan = compress(model, tmp_path / "out", tiny_text_file, ratio=0.0)
    assert plan.whole_after == plan.whole_bytes
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(logits(model), logits(tmp_path / "out"))


def test_sequential_sees_what_the_compressed_layers_put_out(tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama")
    for propagate in ("original", "compressed"):
        compress(model, tmp_path / propagate, tiny_text_file, ratio=0.4, propagate=propagate)
    one, two = (stored(tmp_path / p, "model.layers.0.") for p in ("original", "compressed"))
    assert all(torch.equal(one[name], two[name]) for name in one)  # the first layer sees the same inputs
    one, two = (stored(tmp_path / p, "model.layers.1.") for p in ("original", "compressed"))
    assert not torch.equal(one["model.layers.1.mlp.up_proj.left"], two["model.layers.1.mlp.up_proj.left"])


def test_of_the_original_only_gradients_are_collected_where_layers_see_what_compressed_ones_put_out(
    tiny_checkpoints, tiny_text_file, tmp_path
):
    """With a folder for statistics everything is collected, because other recipes are to find it there: the same result."""
    model = tiny_checkpoints("llama")
    sizes = ["--ratio", 0.4, "--calibration", f"text:{tiny_text_file}", "--samples", 4, "--length", 32]
    asked = ["compress", model, "--recipe", "kfac", "--propagate", "compressed", *sizes]
    alone = lrc_ok(*asked, "--out", tmp_path / "alone")
    sharing = lrc_ok(*asked, "--out", tmp_path / "sharing", "--statistics", tmp_path / "statistics")
    assert "gradients" in alone and not re.search(r"^statistics +\d+/", alone, re.MULTILINE)
    assert re.search(r"^statistics +\d+/", sharing, re.MULTILINE)
    one, two = stored(tmp_path / "alone"), stored(tmp_path / "sharing")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_checkpoints_stay_sixteen_bit(dtype, tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints("llama", dtype=dtype), tmp_path / "out", tiny_text_file, ratio=0.2)
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {dtype}


def test_kept_targets_are_untouched(tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama")
    plan = compress(model, tmp_path / "out", tiny_text_file, ratio=0.4, keep=["*.v_proj", "model.layers.0.*"])
    dense = {step.target.name for step in plan.steps if step.choice.dense}
    assert dense == {s.target.name for s in plan.steps if s.target.role.endswith("v_proj") or s.target.layer == 0}
    original, _ = open_model(str(model))
    small, _ = open_model(str(tmp_path / "out"))
    assert torch.equal(original.model.layers[2].self_attn.v_proj.weight, small.model.layers[2].self_attn.v_proj.weight)


def test_batches_and_devices_change_nothing_but_rounding(tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama")
    compress(model, tmp_path / "one", tiny_text_file, ratio=0.3, samples=60)
    cpu = torch.device("cpu")
    compress(model, tmp_path / "two", tiny_text_file, ratio=0.3, samples=60, devices=[cpu, cpu])
    assert torch.allclose(logits(tmp_path / "one"), logits(tmp_path / "two"), atol=1e-3)


def test_a_method_is_two_files(tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    """The test of the architecture: a throw-away method file and a recipe file, and the whole pipeline knows it."""
    import lrc.compress
    import lrc.compress.base as base

    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "first_columns.py").write_text(
        textwrap.dedent(
            '''
            """Keep the output directions of the first rows: a method that nobody should use."""
            import torch
            from lrc.compress.base import Factored, Settings, method

            @method("first-rows", source="a test")
            def solve(weight, stats, settings):
                eye = torch.eye(len(weight), dtype=torch.float64)
                return Factored(weight.double().square().sum(1), eye, weight.double())
            '''
        )
    )
    (tmp_path / "first.yaml").write_text("# A throw-away recipe.\nmethod: first-rows\nratio: 0.3\n")
    monkeypatch.setattr(lrc.compress, "__path__", [*lrc.compress.__path__, str(tmp_path / "methods")])
    try:
        compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, str(tmp_path / "first.yaml"))
        record = verify(tmp_path / "out")
        assert record["recipe"]["method"] == "first-rows"
        card = (tmp_path / "out" / "README.md").read_text()
        assert "first-rows" in card and "import lrc" in card
    finally:
        base._METHODS.pop("first-rows", None)


def test_files_have_the_mode_of_the_umask(tiny_checkpoints, tiny_text_file, tmp_path):
    """A result is shared with others as any new file is; safetensors writes its files for the owner alone."""
    before = os.umask(0o022)
    try:
        compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "svd", ratio=0.3)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o644}
