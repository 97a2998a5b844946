"""A GGUF file in a plan: read from its header, at the size that it has, in the dtype that its numbers deserve."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from commandline import lrc_ok
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from tiny_gguf import write_tiny_gguf
from transformers import AutoConfig

from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.checkpoint.reading.weights import dtype_of_gguf
from lrc.model.view import ModelView


def rewritten(file: Path, to: Path, kind: GGMLQuantizationType) -> Path:
    """The same model with its matrices in another type."""
    reader = GGUFReader(file)
    writer = GGUFWriter(to, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.data.ndim == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(np.array(tensor.data), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    plain = write_tiny_gguf(folder / "F32.gguf")
    kinds = [GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0]
    return {"F32": plain} | {kind.name: rewritten(plain, folder / f"{kind.name}.gguf", kind) for kind in kinds}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_the_header_alone_gives_what_the_whole_file_gives(kind, files):
    location = locate(str(files[kind]))
    lean, whole = location.config(), AutoConfig.from_pretrained(location.path, gguf_file=location.gguf)
    assert lean.to_json_string() == whole.to_json_string() and lean._name_or_path == str(location.path)
    view = ModelView(location)
    reader = {tensor.name: tensor for tensor in GGUFReader(files[kind]).tensors}
    for layer in range(2):
        stored = reader[f"blk.{layer}.ffn_down.weight"]
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        expected = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        assert torch.equal(view.source.read([name])[name], expected)


def test_a_vocabulary_without_its_size_is_counted(files, tmp_path):
    reader = GGUFReader(files["F32"])
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "llama.vocab_size"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert locate(str(tmp_path / "x.gguf")).config().vocab_size == 64


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("Q8_0", torch.bfloat16),
        ("Q4_0", torch.bfloat16),
    ],
)
def test_the_result_has_the_dtype_of_the_file_or_16_bits(kind, dtype, files):
    assert dtype_of_gguf(files[kind]) == dtype == ModelView(locate(str(files[kind]))).dtype


def test_a_quantized_file_is_told_as_it_is_and_a_larger_result_is_warned_of(files):
    request = ["--recipe", "svd", "--ratio", 0.3]
    printed = lrc_ok("plan", files["Q4_0"], *request)
    held = files["Q4_0"].stat().st_size
    assert f"file: {held / 1e3:.1f} kB as it is, " in printed and "in bfloat16" in printed
    assert "is larger than the file that it is made of" in printed
    assert "file: " not in lrc_ok("plan", files["F32"], *request)


def test_a_baseline_is_measured_in_the_dtype_of_its_result(files):
    assert open_model(str(files["Q8_0"]))[0].dtype == torch.bfloat16


def test_too_few_tokens_are_one_warning_with_the_number_that_would_do(tiny_checkpoints, tiny_text_file):
    request = [
        "plan",
        tiny_checkpoints("llama"),
        "--recipe",
        "svd-llm",
        "--ratio",
        0.3,
        "--calibration",
        f"text:{tiny_text_file}",
    ]
    short = lrc_ok(*request, "--samples", 2, "--length", 20)
    (line,) = [line for line in short.splitlines() if line.startswith("note: ")]
    assert "40 calibration tokens are too few for self_attn.q_proj, self_attn.o_proj, mlp.gate_proj, mlp.up_proj, …" in line
    assert "up to 48 dimensions" in line and "--samples 3 would do (60 tokens)" in line
    assert "too few" not in lrc_ok(*request, "--samples", 3, "--length", 20)
    assert "too few" not in lrc_ok(*request, "--samples", 2, "--length", 20, "--recipe", "svd")
