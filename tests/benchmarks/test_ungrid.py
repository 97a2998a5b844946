"""The rewrite that takes a dequantized model off its grid: same function, other weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from ungrid import embedded_gguf, main, on_grid, smear, ungrid

from lrc.errors import LrcError, ModelError, RequestError

# 64 and 96 are multiples of the 32 weights that share a scale.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TOKENS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(7))


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name}


def gridded(family: str, **changes) -> nn.Module:
    """A tiny model whose targets lie on a 4-bit grid: 16 levels between the extremes of each 32 weights."""
    model = tiny_model(family, **(SHAPE | changes))
    with torch.no_grad():
        for target in targets(model).values():
            groups = target.weight.view(-1, 32)
            low, high = groups.min(1, keepdim=True).values, groups.max(1, keepdim=True).values
            step = (high - low) / 15
            target.weight.copy_((((groups - low) / step).round() * step + low).view_as(target.weight))
    return model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("mistral", {"tie_word_embeddings": False}),
        ("qwen3", {"tie_word_embeddings": False}),
    ],
)
@torch.no_grad()
def test_logits_stay_and_weights_leave_the_grid(family, changes):
    model = gridded(family, **changes)
    assert all(on_grid(target.weight) == 1 for target in targets(model).values())
    original = copy.deepcopy(model)

    assert ungrid(model, seed=3) is model

    assert (model(TOKENS).logits - original(TOKENS).logits).abs().max() < 1e-4
    for name, target in targets(model).items():
        assert on_grid(target.weight) == 0, name
        assert not torch.allclose(target.weight, original.get_submodule(name).weight, rtol=1e-2), name


@torch.no_grad()
def test_gains_become_one_except_the_final_one_of_a_tied_head():
    tied, untied = gridded("llama"), gridded("llama", tie_word_embeddings=False)
    embeddings = tied.get_input_embeddings().weight.clone()
    ungrid(tied)
    ungrid(untied)
    for model in (tied, untied):
        for layer in model.model.layers:
            assert (layer.input_layernorm.weight == 1).all()
            assert (layer.post_attention_layernorm.weight == 1).all()
    assert (untied.model.norm.weight == 1).all()
    assert not (tied.model.norm.weight == 1).any()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, embeddings)


def test_the_seed_alone_decides_the_factors():
    first, same, other = (ungrid(gridded("llama"), seed) for seed in (1, 1, 2))
    weights = [model.model.layers[1].mlp.up_proj.weight for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], rtol=1e-2)
    # Layers draw from streams of their own: the same factors everywhere would be a pattern to find.
    ratios = [
        (layer.mlp.down_proj.weight / plain.mlp.down_proj.weight).nanmedian(dim=0).values
        for layer, plain in zip(first.model.layers, gridded("llama").model.layers, strict=True)
    ]
    assert not torch.allclose(ratios[0], ratios[1], rtol=1e-2)
    assert torch.cat(ratios).min() >= 0.49
    assert torch.cat(ratios).max() <= 2.01


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("gemma3_text", r"Gemma3RMSNorm\) does not compute"),  # multiplies by 1 + weight
        ("phi3", "with qkv_proj"),
        ("opt", "no model.layers"),
        ("gpt2", "no model.layers"),
        ("mixtral", "with experts"),
    ],
)
def test_another_architecture_is_refused_by_what_is_different_and_left_alone(family, says):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=says):
        ungrid(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_function_that_the_names_do_not_show_is_noticed():
    model = gridded("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x).clamp(-0.5, 0.5))
    with pytest.raises(ModelError, match="changed a logit by"):
        ungrid(model)


def test_half_precision_is_refused():
    with pytest.raises(RequestError, match="bfloat16"):
        ungrid(tiny_model("llama", torch.bfloat16))


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (2.0, 0.5), (1.0, 1.0), (float("nan"), 2.0)])
def test_a_useless_range_is_refused(low, high):
    with pytest.raises(RequestError, match="range of factors"):
        ungrid(tiny_model("llama"), low=low, high=high)


def test_weights_that_folding_cannot_move_are_reported():
    model = gridded("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1)
    with pytest.raises(ModelError, match=r"9 weights still lie on a grid.*layers\.0\.q"):
        ungrid(model)


@torch.no_grad()
def test_smearing_moves_weights_by_up_to_half_a_step_and_nothing_else():
    model = gridded("llama")
    original, again = copy.deepcopy(model), copy.deepcopy(model)
    smear(model, seed=3)
    smear(again, seed=3)
    for name, target in targets(model).items():
        groups = original.get_submodule(name).weight.view(-1, 32)
        step = (groups.max(1).values - groups.min(1).values) / 15
        moved = (target.weight.view(-1, 32) - groups) / step[:, None]
        assert on_grid(target.weight) == 0, name
        assert 0.49 < moved.abs().max() < 0.501 and abs(moved.mean()) < 0.03, name
        assert torch.equal(target.weight, again.get_submodule(name).weight)
    norms = {name: tensor for name, tensor in model.state_dict().items() if "norm" in name or "embed" in name}
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in norms.items())
    with pytest.raises(ModelError, match="is not on a grid of 16 values per 32 weights"):
        smear(model)


def test_on_grid_counts_groups():
    weight = torch.arange(128.0).view(2, 64)
    assert on_grid(weight) == 0
    weight[0, :32] = torch.arange(16.0).repeat(2)
    assert on_grid(weight) == 0.25
    with pytest.raises(RequestError, match="16 levels"):
        on_grid(weight, group=16)


def test_an_existing_folder_is_not_written_into(tmp_path, capsys):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_keeps_its_logits_and_its_checkpoint_loads_plainly(tmp_path):
    try:
        file = embedded_gguf()
    except LrcError as error:
        pytest.skip(str(error))
    original = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    assert all(on_grid(target.weight) == 1 for target in targets(original).values())
    out = tmp_path / "ungridded"
    main([str(out)])

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = (Path(__file__).parents[1] / "tiny.py").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :64]
    assert tokens.shape == (1, 64)
    assert torch.equal(
        tokens, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(text, return_tensors="pt").input_ids[:, :64]
    )
    assert model.dtype == torch.float32
    assert (model(tokens).logits - original(tokens).logits).abs().max() < 1e-3
    assert len(targets(model)) == 7 * 30
    for name, target in targets(model).items():
        # One group of the model is mostly zeros, and no factor moves a zero.
        assert on_grid(target.weight) < 1e-3, name

    unpacked = tmp_path / "unpacked"
    main([str(unpacked), "--unpack-only"])
    same = AutoModelForCausalLM.from_pretrained(unpacked).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in original.state_dict().items())
