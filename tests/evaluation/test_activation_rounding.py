"""Activation quantization in evaluation: the arithmetic, who reads rounded values, and what the protocol says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commandline import lrc_ok, run_lrc
from pipeline import compress
from tiny import tiny_text
from torch import nn

from lrc.checkpoint.hf_quantizer import open_model
from lrc.compress.forms import experts
from lrc.errors import EvaluationError
from lrc.evaluation.activation_rounding import int8, mxint8, rounded_activations
from lrc.evaluation.evaluate import evaluate
from lrc.evaluation.results import compare

IDS = torch.arange(3, 40)[None]


def by_token(x: np.ndarray) -> np.ndarray:
    """Symmetric int8, one value at a time, float64."""
    rows = x.reshape(-1, x.shape[-1])
    result = np.zeros_like(rows)
    for i, row in enumerate(rows):
        step = max(abs(value) for value in row) / 127
        result[i] = [round(value / step) * step if step else 0.0 for value in row]
    return result.reshape(x.shape)


def by_block(x: np.ndarray) -> np.ndarray:
    """MXINT8 in blocks of 16, float64."""
    rows = x.reshape(-1, x.shape[-1])
    result = np.zeros_like(rows)
    for i, row in enumerate(rows):
        for start in range(0, len(row), 16):
            block = row[start : start + 16]
            if not block.any():
                continue
            step = 2.0 ** (np.floor(np.log2(np.abs(block).max())) - 6)
            result[i, start : start + 16] = np.clip(np.round(block / step), -128, 127) * step
    return result.reshape(x.shape)


@pytest.mark.parametrize(("rounding", "expected"), [(int8, by_token), (mxint8, by_block)])
@pytest.mark.parametrize("channels", [1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_against_one_value_at_a_time(rounding, expected, channels, dtype):
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, 5, channels, generator=generator) * torch.logspace(-3, 3, channels)
    x[0, 1] = 0
    x = x.to(dtype)
    got = rounding(x)
    assert got.dtype == dtype and got.shape == x.shape
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    assert np.allclose(got.double().numpy(), expected(x.double().numpy()), rtol=tolerance, atol=0)
    if rounding is mxint8:
        assert torch.equal(rounding(got), got), "what lies on the grid stays there"
    assert rounding(torch.zeros(3, 8)).eq(0).all()


def test_every_matrix_of_the_layers_reads_rounded_values_and_nothing_else(tiny_checkpoints):
    model, _ = open_model(str(tiny_checkpoints("llama")))
    with torch.no_grad():
        plain = model(IDS).logits
        with rounded_activations(model, "int8") as said:
            got = model(IDS).logits
        assert torch.equal(model(IDS).logits, plain), "nothing stays behind"
        hooks = [
            module.register_forward_pre_hook(lambda _, args: (torch.tensor(by_token(args[0].double().numpy())).float(),))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith("model.layers.")
        ]
        expected = model(IDS).logits
    assert said == {"activations": "int8, symmetric, per token", "matrices_that_read_rounded_activations": len(hooks)}
    assert torch.allclose(got, expected, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-3)


@pytest.mark.parametrize("recipe", ["svd-llm", "lqer", "svd-llm+gptq", "compot"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_form_reads_rounded_values_once_as_its_dense_matrix_would(family, recipe, tiny_checkpoints, tiny_text_file, tmp_path):
    overrides = {"settings__rank": 4} if recipe == "lqer" else {"ratio": 0.3}
    plan = compress(tiny_checkpoints(family), tmp_path / "out", tiny_text_file, recipe, samples=4, length=32, **overrides)
    model, _ = open_model(str(tmp_path / "out"))
    with torch.no_grad(), rounded_activations(model, "mxint8") as said:
        assert torch.isfinite(model(IDS).logits).all()
        assert said["matrices_that_read_rounded_activations"] == len(plan.steps)
    if family == "mixtral":
        return
    seen = []
    target = next(step.target for step in plan.steps if not step.choice.dense)
    module = model.get_submodule(target.name)
    with torch.no_grad(), rounded_activations(model, "mxint8"):
        module.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
        model(IDS)
    ((x, y),) = seen
    assert torch.equal(x, mxint8(x))
    assert torch.allclose(y, module(x), atol=1e-6), "inside a form nothing is rounded"


@pytest.mark.parametrize("factored", [False, True])
def test_experts_read_rounded_values(factored, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    folder = tiny_checkpoints("mixtral")
    if factored:
        compress(folder, tmp_path / "out", tiny_text_file, samples=4, length=32, ratio=0.3, keep=["*.gate_up_proj"])
        folder = tmp_path / "out"
    model, _ = open_model(str(folder))
    before = model.config._experts_implementation
    seen = []
    real = experts.nn.functional.linear
    monkeypatch.setattr(experts.nn.functional, "linear", lambda x, *rest: (seen.append(x), real(x, *rest))[1])
    with torch.no_grad(), rounded_activations(model, "mxint8"):
        model.model.layers[1].mlp.experts(torch.randn(6, 48), torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1))
    assert len(seen) == (3 if factored else 2)
    assert torch.equal(seen[0], mxint8(seen[0])) and torch.equal(seen[1], mxint8(seen[1]))
    assert model.config._experts_implementation == before


def test_a_model_without_such_matrices_is_told():
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.LayerNorm(3)])
            self.config = type("Config", (), {"get_text_config": lambda self: self})()

    with pytest.raises(EvaluationError, match="No matrix"), rounded_activations(Layers(), "int8"):
        pass


def test_the_command_line_says_what_was_done(tiny_checkpoints, tmp_path):
    model, text = tiny_checkpoints("llama"), tmp_path / "text.txt"
    text.write_text(tiny_text(400))
    command = ["eval", model, "--tasks", f"text:{text}", "--length", 32, "--max-windows", 2, "--json", tmp_path / "r.json"]
    values = {}
    for kind in (None, "int8", "mxint8"):
        lrc_ok(*command, *(["--activations", kind, "--baseline", model] if kind else []))
        (entry,) = json.loads((tmp_path / "r.json").read_text())["results"].values()
        values[entry["protocol"]["activations"]] = entry["value"]
    assert set(values) == {"not quantized", "int8, symmetric, per token", "mxint8, blocks of 16 channels"}
    assert len(set(values.values())) == 3
    result = run_lrc(*command, "--activations", "int9")
    assert result.code == 2
    assert "--activations int9 is not a choice" in result.err and "Did you mean 'int8'?" in result.err
    loaded, tokenizer = open_model(str(model))
    one, two = (
        evaluate(loaded, [f"text:{text}"], tokenizer=tokenizer, length=32, max_windows=2, activations=kind)
        for kind in (None, "int8")
    )
    with pytest.raises(EvaluationError, match="activations int8"):
        compare(two, one)
