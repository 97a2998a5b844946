"""Quantized checkpoints of whole models, on the real path."""

from __future__ import annotations

import json

import pytest
import torch
from pipeline import IDS, compress, logits, place_of
from transformers import AutoModelForCausalLM

from lrc.checkpoint.hf_quantizer import open_model
from lrc.run.verify import verify

EXACT = torch.float32  # half-precision rounding before a router may send a token to another expert


def substituted(model, small) -> torch.Tensor:
    """Logits of the original model with the dense matrix of every compressed module in its place."""
    original, _ = open_model(str(model), dtype=EXACT)
    loaded, _ = open_model(str(small), dtype=EXACT)
    count = 0
    with torch.no_grad():
        for name, module in loaded.named_modules():
            if hasattr(module, "matrix") and not name.endswith((".left", ".right", ".correction")):
                place = place_of(original, name.replace("_forms.", "."))[1]
                place.copy_(module.matrix(place.dtype))
                count += 1
        assert count > 10
        return original(IDS).logits


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16), ("mixtral", torch.float16)])
@pytest.mark.parametrize(
    ("recipe", "chosen"),
    [
        ("rtn", {"bits": 8, "grid": "mxint", "group_size": 32}),
        ("gptq", {"bits": 3, "group_size": 20}),
        ("qera", {"rank": 4, "factor_bits": 8}),
        ("caldera", {"rank": 5, "bits": 4, "rounds": 2}),
        ("caldera", {"rank": 5, "bits": 4, "rounds": 1, "code": "trellis", "state_bits": 8}),
        ("caldera", {"rank": 5, "bits": 4, "rounds": 1, "code": "e8", "factor_code": "e8"}),
        ("yaqa", {"bits": 4, "state_bits": 8, "gains": True}),
    ],
)
def test_a_quantized_checkpoint_loads_as_what_was_computed(
    family, dtype, recipe, chosen, tiny_checkpoints, tiny_text_file, tmp_path
):
    model = tiny_checkpoints(family, dtype=dtype)
    plan = compress(model, tmp_path / "out", tiny_text_file, recipe, **{f"settings__{k}": v for k, v in chosen.items()})
    record = verify(tmp_path / "out")  # bytes as planned among its checks
    assert all(0 < target["error"] < 0.2 and target["bytes_after"] < target["bytes_before"] for target in record["targets"])
    assert plan.ratio > 0.4
    expected = substituted(model, tmp_path / "out")
    assert torch.allclose(logits(tmp_path / "out", EXACT), expected, atol=1e-3 * float(expected.abs().max()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    held = again.state_dict()
    assert [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, held[name])] == []


def test_a_checkpoint_of_eight_bits_is_no_dense_one(tiny_checkpoints, tiny_text_file, tmp_path):
    """Codes of 8 bits are as many bytes as the matrix has numbers: a reader without lrc must not take them for weights."""
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "rtn", settings__bits=8, settings__grid="mxint")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"], config["transformers_weights"]  # as a reader that knows neither
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("propagate", ["original", "compressed"])
@pytest.mark.parametrize(
    "text",
    [
        "method: qera\nsettings: {rank: null}\nratio: 0.7\nrank_multiple: 2\n",
        "method: gptq\nsettings: {bits: null}\nratio: 0.7\n",
        "steps:\n- method: svd-llm\n- method: gptq\n  settings: {bits: 8}\nratio: 0.6\n",
    ],
)
def test_the_budget_decides_where_settings_leave_it_open(text, propagate, tiny_checkpoints, tiny_text_file, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    model = tiny_checkpoints("llama")
    plan = compress(model, tmp_path / "out", tiny_text_file, str(tmp_path / "recipe.yaml"), propagate=propagate)
    assert plan.recipe.ratio <= plan.ratio < plan.recipe.ratio + 0.13
    expected = substituted(model, tmp_path / "out") if "steps" not in text else logits(tmp_path / "out", EXACT)
    assert torch.allclose(logits(tmp_path / "out", EXACT), expected, atol=1e-3)
    assert verify(tmp_path / "out")["bytes"]["targets_after"] == plan.targets_after
