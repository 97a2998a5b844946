"""fp8 checkpoints as they are found: read with their scales into 16 bit; whatever else is quantized is refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import lrc_ok, run_lrc
from pipeline import IDS, logits
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.checkpoint.location import locate
from lrc.checkpoint.reading.fp8 import descaled, scale_blocks
from lrc.checkpoint.streamed import Checkpoint

SINGLE = "model.safetensors"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DOWN = "model.layers.1.mlp.down_proj.weight"  # (48, 80)
PER_TENSOR: tuple[int, int] | None = None


def rounded(weight: Tensor, block: tuple[int, int] | None, stored: torch.dtype = E4M3) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (…, out, in) in fp8: (stored, its scales, the product in float64). `block` None: one scale for all of it."""
    weight = weight.double()
    rows, columns = block or weight.shape[-2:]
    if block is None:
        scale = (weight.abs().max() / 448).float().reshape(1)
        wide = scale.double().expand(weight.shape)
    else:
        counts = [-(-size // part) for size, part in zip(weight.shape[-2:], block, strict=True)]
        scale = torch.empty(*weight.shape[:-2], *counts)
        wide = torch.empty_like(weight)
        for i in range(counts[0]):
            for j in range(counts[1]):
                part = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scale[..., i, j] = (weight[part].abs().amax((-1, -2)) / 448).float()
                wide[part] = scale[..., i, j].double()[..., None, None]
    quantized = (weight / wide).to(stored)
    return quantized, scale, quantized.double() * wide


def write_fp8(
    original: Path,
    folder: Path,
    *,
    block: tuple[int, int] | None = PER_TENSOR,
    scale: str = "_scale_inv",
    extra: str = "",
    declared: dict[str, Any] | None = None,
    modelopt: dict[str, Any] | None = None,
    stored: torch.dtype = E4M3,
) -> dict[str, Tensor]:
    """Write the projections of a checkpoint in fp8; name -> what the weights stand for, in float64."""
    shutil.copytree(original, folder)
    meant, written = {}, {}
    for name, tensor in load_file(folder / SINGLE).items():
        if "proj" in name or ".w1." in name or ".w2." in name or ".w3." in name:
            written[name], written[name + scale], meant[name] = rounded(tensor, block, stored)
            if extra:
                written[name.replace("weight", extra)] = torch.ones(1)
        else:
            written[name] = tensor
    save_file(written, folder / SINGLE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": declared} if declared else {}
    (folder / "config.json").write_text(json.dumps(config))
    if modelopt:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": modelopt}))
    return meant


COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}}
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "DeepSeek and Qwen": {"block": (32, 32), "declared": {"quant_method": "fp8", "weight_block_size": [32, 32]}},
    "per tensor, declared": {"declared": {"quant_method": "fp8", "weight_block_size": None}, "extra": "activation_scale"},
    "per row": {"block": (1, 1 << 20), "scale": "_scale", "declared": {"quant_method": "fbgemm_fp8"}},
    "compressed-tensors": {"scale": "_scale", "declared": COMPRESSED_TENSORS, "extra": "input_scale"},
    "ModelOpt": {"scale": "_scale", "modelopt": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "extra": "input_scale"},
    "ModelOpt in config.json": {"scale": "_scale", "declared": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    "nothing declared": {"block": (16, 16)},
    "E5M2": {"stored": E5M2, "scale": "_scale"},
}


@pytest.fixture(scope="module")
def original(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama", num_hidden_layers=2, shard="1GB", dtype=torch.bfloat16)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_fp8_is_read(way, original, tmp_path):
    meant = write_fp8(original, tmp_path / "fp8", **WAYS[way])
    view = Checkpoint(locate(str(tmp_path / "fp8")))
    assert view.dtype == torch.bfloat16
    read = view.source.read(view.source.names())
    for name, value in meant.items():
        # rounded to float32, then to bfloat16 with its 8 bits
        error = (read[name].double() - value).abs()
        assert (error <= value.abs() * (2**-8 + 2**-23)).all(), name
    assert f"{len(meant)} fp8 tensors are read with their scales into bfloat16" in view.notes[0]
    left = "14 scales of activations and of the key-value cache are left out"
    assert (left in view.notes[0]) == ("extra" in WAYS[way])
    assert not hasattr(view.config, "quantization_config")
    for layer in view.layer_names:
        view.load(layer)
    assert torch.equal(view.model.get_parameter(DOWN), read[DOWN])


@pytest.mark.parametrize("way", ["DeepSeek and Qwen", "ModelOpt"])
def test_the_whole_way_from_fp8(way, original, request_for, text, tmp_path):
    """compress, verify and eval; the result is in 16 bit, and nothing of it says fp8."""
    meant = write_fp8(original, tmp_path / "fp8", **WAYS[way])
    same = shutil.copytree(original, tmp_path / "same")
    held = load_file(same / SINGLE)
    save_file(held | {name: value.float().bfloat16() for name, value in meant.items()}, same / SINGLE, {"format": "pt"})
    assert torch.equal(logits(tmp_path / "fp8"), logits(same)), "what lrc eval measures"
    printed = lrc_ok(*request_for(tmp_path / "fp8", tmp_path / "out"))
    assert "weights: 14 fp8 tensors are read with their scales into bfloat16" in printed
    lrc_ok(*request_for(same, tmp_path / "out2"))
    for shard in (tmp_path / "out").glob("*.safetensors"):
        one, two = load_file(shard), load_file(tmp_path / "out2" / shard.name)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    lrc_ok("verify", tmp_path / "out")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "lrc"
    lrc_ok("eval", tmp_path / "out", "--baseline", tmp_path / "fp8", "--tasks", text, "--length", 64, "--max-windows", 1)


def test_the_numbers_are_those_of_transformers(original, tmp_path):
    declared = {"quant_method": "fp8", "weight_block_size": [16, 16]}  # transformers needs blocks that divide every shape
    write_fp8(original, tmp_path / "fp8", block=(16, 16), declared=declared)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    read = Checkpoint(locate(str(tmp_path / "fp8"))).source.read([DOWN])[DOWN]
    assert torch.equal(read, theirs.get_parameter(DOWN))
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "fp8"), theirs(IDS).logits)


def test_a_mixture_whose_experts_are_stored_one_by_one(tiny_checkpoints, request_for, tmp_path):
    """transformers fuses experts when it loads them; the scales are applied before."""
    original = tiny_checkpoints("mixtral", num_hidden_layers=2, shard="1GB", dtype=torch.bfloat16)
    declared = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    meant = write_fp8(original, tmp_path / "fp8", block=(32, 32), declared=declared)
    assert sum(".experts." in name for name in meant) == 2 * 4 * 3
    view = Checkpoint(locate(str(tmp_path / "fp8")))
    view.load(view.layer_names[1])
    fused = view.model.get_parameter("model.layers.1.mlp.experts.down_proj")
    names = [f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(4)]
    assert torch.equal(fused, torch.stack([meant[name].float().bfloat16() for name in names]))
    lrc_ok(*request_for(tmp_path / "fp8", tmp_path / "out"))
    lrc_ok("verify", tmp_path / "out")
    assert torch.isfinite(logits(tmp_path / "fp8")).all()


# ---- arithmetic

SHAPES = [
    ((48, 80), (1,), None, (48, 80)),
    ((48, 80), (), None, (48, 80)),
    ((48, 80), (48,), None, (1, 80)),
    ((48, 80), (48, 1), None, (1, 80)),
    ((48, 80), (3, 5), None, (16, 16)),
    ((576, 7168), (5, 56), None, (128, 128)),
    ((192, 130), (2, 2), None, (128, 128)),
    ((48, 90), (1, 3), None, (48, 32)),
    ((48, 80), (2, 3), (32, 32), (32, 32)),
    ((48, 80), (2, 3), (16, 16), None),
    ((48, 80), (80,), None, None),
    ((48, 80), (3, 5, 1), None, None),
    ((48, 80), (49, 80), None, None),
    ((4, 48, 80), (4,), None, (1, 48, 80)),
    ((4, 48, 80), (4, 1, 80), None, (1, 48, 1)),
    ((4, 48, 80), (4, 3, 5), None, (1, 16, 16)),
    ((4, 48, 80), (2, 3, 5), None, None),
    ((48,), (3,), None, None),
]


@pytest.mark.parametrize(("weight", "scale", "declared", "blocks"), SHAPES)
def test_the_blocks_of_a_scale(weight, scale, declared, blocks):
    assert scale_blocks(weight, scale, declared) == blocks
    if blocks is None:
        return
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(weight, generator=generator).to(E4M3).float()
    scales = torch.rand(scale, generator=generator) + 0.5
    full = scales.reshape([1] * len(weight) if scales.numel() == 1 else [*scale, *[1] * (len(weight) - len(scale))])
    own = [torch.arange(size) // block for size, block in zip(weight, blocks, strict=True)]  # the block of every index
    expected = values.double() * full.double()[torch.meshgrid(*own, indexing="ij")]
    torch.testing.assert_close(descaled(values, scales, blocks).double(), expected, rtol=2**-23, atol=0)


def test_scales_as_exponents(original, tmp_path):
    """mxfp8: one byte per 32 columns, an exponent of two."""
    declared = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    meant = write_fp8(original, tmp_path / "fp8", block=(1, 32), declared=declared)
    held = load_file(tmp_path / "fp8" / SINGLE)
    for name in meant:
        exponents = held[name + "_scale_inv"].log2().round()
        held[name + "_scale_inv"] = (exponents + 127).to(torch.uint8)
        wide = torch.exp2(exponents.double()).repeat_interleave(32, -1)[:, : held[name].shape[1]]
        meant[name] = held[name].double() * wide
    save_file(held, tmp_path / "fp8" / SINGLE, metadata={"format": "pt"})
    read = Checkpoint(locate(str(tmp_path / "fp8"))).source.read(list(meant))
    assert all(torch.equal(read[name], value.float().bfloat16()) for name, value in meant.items())


# ---- refused


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("command", ["plan", "eval"])
def test_a_scale_that_is_none(value, command, original, text, tmp_path, no_forward):
    write_fp8(original, tmp_path / "fp8", **WAYS["DeepSeek and Qwen"])
    held = load_file(tmp_path / "fp8" / SINGLE)
    held[DOWN + "_scale_inv"][0, 1] = value
    save_file(held, tmp_path / "fp8" / SINGLE, metadata={"format": "pt"})
    more = ["--ratio", 0.3] if command == "plan" else ["--tasks", text, "--length", 64]
    result = run_lrc(command, tmp_path / "fp8", *more)
    assert result.code == 1 and f"1 of 6 scales in '{DOWN}_scale_inv' are zero, negative or not finite" in result.err


def without(ending: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda held: {name: tensor for name, tensor in held.items() if name != DOWN + ending}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("_scale_inv"), f"'{DOWN}' is stored in fp8 and has no scale"),
        (lambda held: held | {DOWN + "_scale_inv": torch.ones(3, 3)}, f"'{DOWN}' has shape (48, 80) and its scale"),
        (lambda held: held | {DOWN + "_scale": torch.ones(1)}, "two scales"),
        (lambda held: held | {DOWN: held[DOWN].view(torch.uint8)}, f"'{DOWN}' is stored as U8"),
    ],
)
def test_fp8_that_cannot_be_read(change, named, original, text, tmp_path, no_forward):
    write_fp8(original, tmp_path / "fp8", **WAYS["DeepSeek and Qwen"])
    save_file(change(load_file(tmp_path / "fp8" / SINGLE)), tmp_path / "fp8" / SINGLE, metadata={"format": "pt"})
    result = run_lrc("compress", tmp_path / "fp8", "--recipe", "svd", "--ratio", 0.3, "--out", tmp_path / "out")
    assert result.code == 2 and named in result.err
    assert not (tmp_path / "out").exists()


def test_float32_in_config_json_asks_for_a_dtype(tiny_checkpoints, tmp_path):
    original = tiny_checkpoints("llama", num_hidden_layers=2, shard="1GB")
    write_fp8(original, tmp_path / "fp8", **WAYS["ModelOpt"])
    result = run_lrc("plan", tmp_path / "fp8", "--ratio", 0.3)
    assert result.code == 2 and "--dtype bfloat16" in result.err
    assert "read with their scales into float16" in lrc_ok("plan", tmp_path / "fp8", "--ratio", 0.3, "--dtype", "float16")
    write_fp8(original, tmp_path / "declared", **WAYS["per tensor, declared"])
    assert Checkpoint(locate(str(tmp_path / "declared"))).dtype == torch.float32, "as from_pretrained"


FOREIGN = {
    "awq": {"quant_method": "awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True, "quant_method": "bitsandbytes"},
    "mxfp4": {"quant_method": "mxfp4"},
    "pack-quantized": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": {
        "num_bits": 4, "type": "int"}}}},
    "rotated": COMPRESSED_TENSORS | {"transform_config": {"config_groups": {"R1": {}}}},
    "NVFP4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
}  # fmt: skip


def declare(folder: Path, declared: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": declared}))


@pytest.mark.parametrize("method", FOREIGN)
def test_other_quantized_checkpoints_are_refused_by_name(method, original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "quantized")
    declare(folder, FOREIGN[method])
    result = run_lrc("plan", folder, "--ratio", 0.3)
    assert result.code == 2 and "compressed already" in result.err and method in result.err
    assert "16-bit original" in result.err


@pytest.mark.parametrize("text", ["", "[]", '{"quantization": 3}', "[" * 100_000, '{"quantization": {"quant_algo": [1]}}'])
def test_a_damaged_hf_quant_config(text, original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "quantized")
    (folder / "hf_quant_config.json").write_text(text)
    result = run_lrc("plan", folder, "--ratio", 0.3)
    assert result.code == 2 and result.err.count("\n") == 2, result.err


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 1}, "sparsity_config": 3},
        {"quant_method": "fp8", "weight_block_size": [-1, 0]},
        {"quant_method": 7},
        {"bits": 4},
    ],
)
def test_a_damaged_declaration(declared, original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "quantized")
    declare(folder, declared)
    result = run_lrc("plan", folder, "--ratio", 0.3)
    assert result.code == (0 if declared.get("quant_method") == "fp8" else 2), result.err


def test_what_only_hf_quant_config_declares(original, tmp_path, text, no_forward):
    folder = shutil.copytree(original, tmp_path / "quantized")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    for command in (["plan", folder, "--ratio", 0.3], ["eval", folder, "--tasks", text, "--length", 64]):
        result = run_lrc(*command)
        assert result.code == 2 and "ModelOpt NVFP4" in result.err


def test_a_cache_in_fp8_is_no_quantized_weight(original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "quantized")
    declared = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(declared))
    assert "fp8 tensors" not in lrc_ok("plan", folder, "--ratio", 0.3)


@pytest.mark.parametrize(
    ("method", "package"),
    [("awq", "gptqmodel"), ("gptq", "optimum"), ("bitsandbytes", "bitsandbytes"), ("pack-quantized", "compressed-tensors")],
)
@pytest.mark.parametrize("place", ["model", "baseline"])
def test_a_quantized_model_to_measure_whose_package_is_missing(method, package, place, original, text, tmp_path, no_forward):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed here")
    folder = shutil.copytree(original, tmp_path / "quantized")
    declare(folder, FOREIGN[method])
    models = [folder] if place == "model" else [original, "--baseline", folder]
    result = run_lrc("eval", *models, "--tasks", text, "--length", 64)
    assert result.code == 2, result.err
    assert result.err.count("\n") == 2 and f"pip install {package}" in result.err


def test_config_of_a_plain_model_is_left_alone(original):
    view = Checkpoint(locate(str(original)))
    assert view.notes == () and view.config.to_dict() == AutoConfig.from_pretrained(original).to_dict()
