"""GGUF exports, run by llama.cpp itself: the same tokens of text and the same probabilities, or a refusal by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from pipeline import compress, compressed_once

from lrc.compress.forms.grids import Grid
from lrc.errors import CheckpointError, RequestError
from lrc.export.gguf import blocks
from lrc.export.write import export

EVEN = {"hidden_size": 64, "intermediate_size": 96}
CODES = {"settings__group_size": 32}
SYMMETRIC = CODES | {"settings__symmetric": True}
WIDE = {"sliding_window": None}
RESULTS: dict[str, tuple[str, str, dict, dict]] = {
    "low rank": ("llama", "svd-llm", {"ratio": 0.3}, {}),
    "own head": ("llama", "svd-llm", {"ratio": 0.3}, {"tie_word_embeddings": False}),
    "mistral": ("mistral", "svd-llm", {"ratio": 0.3}, WIDE),
    "qwen3": ("qwen3", "svd-llm", {"ratio": 0.3}, {}),
    "fused gate": ("phi3", "svd-llm", {"ratio": 0.3}, WIDE),
    "gpt2": ("gpt2", "svd-llm", {"ratio": 0.3}, {}),
    "experts": ("mixtral", "svd-llm", {"ratio": 0.3}, WIDE),
    "narrow": ("llama", "narrow", {"ratio": 0.3}, {}),
    "dropped layer": ("llama", "block-influence", {"ratio": 0.3}, {}),
    "rotary positions of Llama 3": (
        "llama", "svd-llm", {"ratio": 0.3},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "codes": ("llama", "rtn", SYMMETRIC, EVEN),
    "codes with zeros": ("llama", "gptq", CODES, EVEN),
    "codes and corrections": ("llama", "qera", SYMMETRIC | {"settings__rank": 4, "settings__factor_bits": 8}, EVEN),
}  # fmt: skip
TYPE = {"codes": "Q4_0", "codes with zeros": "Q4_1", "codes and corrections": "Q4_0"}


@pytest.fixture(scope="module")
def results(tiny_checkpoints, tiny_text_file, tmp_path_factory):
    """A function name -> folder of a finished result, compressed once."""
    return compressed_once(RESULTS, tiny_checkpoints, tiny_text_file, tmp_path_factory, "tiny")


@pytest.mark.parametrize("name", RESULTS)
def test_llama_cpp_computes_what_the_result_computes(name, results, tmp_path):
    pytest.importorskip("xllamacpp")
    done = export(results(name), "gguf", out=tmp_path / "out", dtype=torch.float32)
    assert done.difference is not None and done.difference < (0.05 if name in TYPE else 5e-4)
    files = {path.name for path in done.folder.iterdir()}
    assert files == {"README.md", "tiny.gguf"} | ({"tiny-lora.gguf"} if name == "codes and corrections" else set())
    assert f"llama-cli -m tiny.gguf{' --lora' if len(files) == 3 else ''}" in (done.folder / "README.md").read_text()


@pytest.mark.parametrize("name", TYPE)
def test_codes_are_stored_as_they_are(name, results, tmp_path):
    """The numbers in the file, by the gguf package's own decoder, are those of the result."""
    import gguf
    from transformers import AutoModelForCausalLM

    import lrc  # noqa: F401

    done = export(results(name), "gguf", out=tmp_path / "out", check=False)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(done.folder / "tiny.gguf").tensors}
    stored = held["blk.1.ffn_up.weight"]
    assert stored.tensor_type.name == TYPE[name]
    model = AutoModelForCausalLM.from_pretrained(results(name))
    module = model.model.layers[1].mlp.up_proj
    found = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    if name == "codes and corrections":
        lora = {
            each.name: torch.from_numpy(each.data.copy()) for each in gguf.GGUFReader(done.folder / "tiny-lora.gguf").tensors
        }
        found = found + lora["blk.1.ffn_up.weight.lora_b"] @ lora["blk.1.ffn_up.weight.lora_a"]
    inputs = torch.eye(64)
    with torch.no_grad():
        torch.testing.assert_close(found, module(inputs).T, atol=1e-3 if name == "codes with zeros" else 1e-5, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_grid_has_a_type(bits, symmetric):
    """Blocks decoded by the gguf package give the grid's own values, up to float16's precision of an offset."""
    import gguf

    grid = Grid(bits, 64, symmetric=symmetric)
    weight = torch.randn(8, 160, generator=torch.Generator().manual_seed(bits))
    scales = grid.scales(weight)
    codes = grid.encode(weight, scales)
    steps = scales.steps.float()
    held = blocks.encoded("x", grid, codes, steps, scales.zeros)
    found = torch.from_numpy(gguf.quants.dequantize(held, blocks.block_type(grid)))
    error = (found - grid.decode(codes, scales, torch.float32)).abs().max() / steps.max()
    assert error <= (1 if not blocks.is_exact(grid) else 0 if blocks.block_type(grid).name.endswith("0") else 2.0**-6)
    assert held.dtype == np.uint8 and held.shape[0] == 8


def test_a_step_beyond_float16_is_refused():
    grid = Grid(4, 32)
    with pytest.raises(CheckpointError, match="have no value in float16"):
        blocks.encoded("x", grid, torch.zeros(1, 32, dtype=torch.uint8), torch.full((1, 1), 1e6), None)


@pytest.mark.parametrize(
    ("family", "message"),
    [("mistral", "sliding window of 12"), ("opt", "an architecture 'opt'"), ("gemma3_text", "an architecture 'gemma3_text'")],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family, message, tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints(family), tmp_path / "tiny", tiny_text_file, "svd-llm", ratio=0.3)
    with pytest.raises(RequestError, match=message):
        export(tmp_path / "tiny", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_tokenizer_that_splits_otherwise_is_refused(results, tmp_path):
    shutil.copytree(results("low rank"), tmp_path / "tiny")
    file = tmp_path / "tiny" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"},
                                                                      content["pre_tokenizer"]]}  # fmt: skip
    file.write_text(json.dumps(content))
    with pytest.raises(RequestError, match="splits text by rules"):
        export(tmp_path / "tiny", "gguf", out=tmp_path / "out", check=False)


def test_a_file_with_other_weights_gets_no_name(results, tmp_path, monkeypatch):
    """Rows of queries in another order, as if a conversion had forgotten how llama.cpp rotates."""
    pytest.importorskip("xllamacpp")
    from lrc.export.gguf.architectures import Names

    monkeypatch.setattr(Names, "rows", lambda self, name: None)
    with pytest.raises(CheckpointError, match="logits of the export differ"):
        export(results("low rank"), "gguf", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
