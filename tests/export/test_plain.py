"""Feed-forwards that keep equally many channels: the result is a checkpoint of the same architecture, which needs no lrc."""

import json

import pytest
import torch
from pipeline import compress
from safetensors.torch import load_file
from stock import refused_without_lrc, stock_python
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lrc.checkpoint.hf_quantizer import open_model
from lrc.export.plain import as_plain
from lrc.run.verify import verify

IDS = torch.arange(3, 15)[None]
WIDTH = {"llama": "intermediate_size", "gemma3_text": "intermediate_size", "phi3": "intermediate_size",
         "gpt_neox": "intermediate_size", "opt": "ffn_dim"}  # fmt: skip


@pytest.mark.parametrize("family", WIDTH)
def test_any_tool_loads_narrower_feed_forwards(family, tiny_checkpoints, tiny_text_file, tmp_path):
    """The same tensors through lrc's forms and through a plain model of the new width give the same logits."""
    out = tmp_path / "out"
    plan = compress(tiny_checkpoints(family), out, tiny_text_file, "narrow", ratio=0.3)
    record, config = verify(out), json.loads((out / "config.json").read_text())
    (channels,) = {step.choice.channels for step in plan.steps if not step.choice.dense}
    assert "quantization_config" not in config and config[WIDTH[family]] == channels
    assert record["bytes"]["model_after"] == plan.whole_after < plan.whole_bytes
    assert "import lrc" not in (out / "README.md").read_text()
    done = stock_python(
        """
        import sys, torch
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
        model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        torch.save(model.eval()(torch.arange(3, 15)[None]).logits, sys.argv[2])
        assert "lrc" not in sys.modules
        """,
        out, tmp_path / "logits.pt",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    original, _ = open_model(str(tiny_checkpoints(family)))
    tensors = {key: value for shard in record["shards"] for key, value in load_file(out / shard).items()}
    sublayers, stay = 2 if family == "phi3" else 1, torch.zeros(0)
    with torch.no_grad():
        for step in (step for step in plan.steps if not step.choice.dense):
            whole, left = original.get_submodule(step.target.module), tensors[f"{step.target.module}.weight"]
            if len(left) == len(whole.weight):  # the one that reads: fitted, at the channels of those that make them
                assert left.shape[1] == channels
                whole.weight.zero_()[:, stay] = left
                continue
            found = (whole.weight[:, None] == left[None]).all(-1).any(1)
            assert int(found.sum()) == sublayers * channels
            stay = found[: len(found) // sublayers]
        expected = original(IDS).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-4)


def test_training_end_to_end_leaves_it_plain(tiny_checkpoints, tiny_text_file, tmp_path):
    refine = {"end-to-end": {"steps": 4, "every": 2, "lr": 1e-3}}
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "narrow", ratio=0.3, samples=16, refine=refine,
             calibration__held_out=2)  # fmt: skip
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits).all()


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"limits": {"*.layers.0.mlp.*": {"min": 0.9}}}),  # widths differ
        ("llama", {"keep": ["*att*", "*.layers.1.*"]}),  # one layer keeps all of its channels
        ("llama", {"keep": []}),  # attention is factored
        ("gpt2", {}),  # its weights lie the other way round
    ],
)
def test_anything_else_is_stored_in_forms(family, overrides, tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints(family), tmp_path / "out", tiny_text_file, "narrow", ratio=0.3, **overrides)
    verify(tmp_path / "out")
    assert "import lrc" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert refused_without_lrc([tmp_path / "out"]) == 1


def test_another_entry_of_the_same_value_is_no_obstacle():
    """The vocabulary is as large as the inner width, comes first, and holds a padding token that it would lose."""
    whole = LlamaConfig(vocab_size=96, pad_token_id=95, hidden_size=48, intermediate_size=96, num_hidden_layers=1,
                        num_attention_heads=4).to_dict()  # fmt: skip
    shapes = {"gate_proj": (70, 48), "up_proj": (70, 48), "down_proj": (48, 70)}
    dense = {"kind": "dense", "bias": False}
    modules = {
        f"model.layers.0.mlp.{name}": {"kind": "pruned", "rows": rows, "columns": columns, "form": dense}
        for name, (rows, columns) in shapes.items()
    }
    config = {"vocab_size": whole.pop("vocab_size"), **whole, "quantization_config": {"modules": modules}}
    found = as_plain(config, LlamaConfig, LlamaForCausalLM)
    assert "quantization_config" not in found and (found["vocab_size"], found["intermediate_size"]) == (96, 70)
