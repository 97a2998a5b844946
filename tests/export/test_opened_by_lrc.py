"""Exports and copies in the hands of lrc itself: evaluated where that is sound, and forged ones run no code."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from commandline import lrc_ok, run_lrc
from pipeline import IDS, compress, logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.checkpoint.hf_quantizer import open_model
from lrc.errors import ModelError
from lrc.export.write import export

EVEN = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def corrected(tiny_checkpoints, tiny_text_file, tmp_path_factory) -> Path:
    """A result with codes and corrections."""
    out = tmp_path_factory.mktemp("corrected") / "out"
    compress(tiny_checkpoints("llama", **EVEN), out, tiny_text_file, "qera", settings__group_size=16, settings__rank=4)
    return out


@pytest.fixture(scope="module")
def exported(corrected, tmp_path_factory) -> Path:
    """The same as codes of compressed-tensors and an adapter of PEFT."""
    pytest.importorskip("compressed_tensors")
    return export(corrected, "compressed-tensors", out=tmp_path_factory.mktemp("export") / "out").folder


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


def test_codes_with_an_adapter_are_evaluated_as_a_whole(corrected, exported, text):
    assert torch.allclose(logits(exported), logits(corrected), atol=1e-4)
    lrc_ok("eval", exported, "--tasks", text, "--length", 64)
    refused = run_lrc("plan", exported, "--ratio", 0.3)
    assert refused.code != 0 and "is compressed already (quant_method: compressed-tensors" in refused.err


def pickled(folder: Path, place: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(place)))


def pickled_too(folder: Path, place: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(place)))


def of_a_module(folder: Path, place: Path) -> None:
    """`auto_mapping` makes PEFT import a module by name."""
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(place)!r})")
    held = json.loads((folder / "adapter_config.json").read_text())
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    (folder / "adapter_config.json").write_text(json.dumps(held | {"auto_mapping": mapping}))


def of_another_model(folder: Path, place: Path) -> None:
    held = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(held | {"base_model_name_or_path": str(place)}))


def pickled_weights(folder: Path, place: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(place)))


@pytest.mark.parametrize("forge", [pickled, pickled_too, of_a_module, of_another_model, pickled_weights])
@pytest.mark.parametrize("command", [("eval",), ("bench",)])
def test_a_forged_adapter_runs_no_code(forge, command, exported, text, tmp_path):
    folder, place = shutil.copytree(exported, tmp_path / "export"), tmp_path / "ran"
    forge(folder, place)
    more = ("--tasks", text) if command == ("eval",) else ()
    refused = run_lrc(*command, folder, *more)
    assert refused.code in (1, 2) and refused.err.startswith("lrc: ") and not place.exists()


def test_code_beside_the_weights_does_not_run_unasked(corrected, text, tmp_path):
    folder, place = export(corrected, "self-contained", out=tmp_path / "own").folder, tmp_path / "ran"
    for path in folder.glob("*.py"):
        path.write_text(f"import os\nos.mkdir({str(place)!r})\n")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    for command in (("eval", folder, "--tasks", text), ("bench", folder), ("plan", folder, "--ratio", 0.3)):
        assert run_lrc(*command).code in (1, 2)
    AutoTokenizer.from_pretrained(folder)
    assert not place.exists()


def test_a_copy_by_save_pretrained_is_evaluated_and_exported_and_verify_says_what_it_is(corrected, text, tmp_path):
    model, tokenizer = open_model(str(corrected))
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = model(IDS).logits
    assert torch.equal(logits(tmp_path / "again"), expected)
    lrc_ok("eval", tmp_path / "again", "--tasks", text, "--length", 64)
    done = export(tmp_path / "again", "dense", out=tmp_path / "dense")
    assert done.difference is not None and done.difference < 1e-5
    refused = run_lrc("verify", tmp_path / "again")
    assert refused.code == 1 and "save_pretrained" in refused.err and "no record" in refused.err


def test_an_adapter_is_trained_saved_and_loaded_on_compressed_modules(corrected, tmp_path):
    peft = pytest.importorskip("peft")
    import lrc

    def config(**more: object) -> object:
        return lrc.lora_config(peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **more))

    base = open_model(str(corrected))[0]
    with torch.no_grad():
        before = base(IDS).logits
    model = peft.get_peft_model(base, config())
    assert torch.equal(model(IDS).logits, before)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = model.eval()(IDS).logits
    assert not torch.allclose(after, before, atol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(open_model(str(corrected))[0], tmp_path / "adapter", config=config()).eval()
    assert torch.allclose(again(IDS).logits, after, atol=1e-5)
    with pytest.raises(ModelError, match="cannot be merged into a QuantizedLowRankLinear"):
        again.merge_and_unload()
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(open_model(str(corrected))[0], peft.LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(lrc.errors.RequestError, match="pissa"):
        config(init_lora_weights="pissa")
    dense = open_model(str(corrected))[0].dequantize()
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    assert torch.allclose(merged(IDS).logits, after, atol=1e-3)
