"""`model.dequantize()`: the original's own modules with dense weights, for tools such as PEFT that know no others."""

from __future__ import annotations

import pytest
import torch
from pipeline import IDS, compress
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lrc.errors import ModelError


@pytest.mark.parametrize(
    ("family", "recipe", "settings"),
    [
        ("llama", "svd-llm", {"ratio": 0.3}),
        ("gpt2", "qera", {"settings__group_size": 16, "settings__rank": 4, "settings__factor_bits": 8}),
        ("mixtral", "svd-llm", {"ratio": 0.3}),
        ("llama", "basis-sharing", {"ratio": 0.3}),
    ],
)
def test_a_dense_model_answers_the_same_and_can_be_saved(family, recipe, settings, tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints(family), tmp_path / "out", tiny_text_file, recipe, **settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        before = model(IDS).logits
        model.dequantize()
        after = model(IDS).logits
    assert float((after - before).norm()) < 1e-4 * float(before.norm())
    assert not any(type(module).__module__.startswith("lrc.") for module in model.modules())
    model.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(IDS).logits
    assert float((again - after).norm()) < 1e-4 * float(after.norm())
    if family == "gpt2":
        compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        compressed.save_pretrained(tmp_path / "again")
        assert compressed.dequantize().dtype == torch.float32, "saving leaves the dtype's name in the configuration"
        assert isinstance(model.transformer.h[0].mlp.c_fc, Conv1D)


def test_peft_attaches_to_a_dequantized_model_and_trains(tiny_checkpoints, tiny_text_file, tmp_path):
    from peft import LoraConfig, get_peft_model

    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "svd-llm", ratio=0.3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    tuned(IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.parameters())


def test_fewer_channels_have_no_place_in_the_architecture(tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "lrc-fast", ratio=0.3)
    with pytest.raises(ModelError, match="export --to dense"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize()
