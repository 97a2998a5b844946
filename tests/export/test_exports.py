"""Exports, opened by tools that know nothing of lrc: the logits of the result, or a refusal that names what is in the way."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from commandline import run_lrc
from pipeline import compress, compressed_once, logits
from safetensors.torch import load_file, save_file
from stock import stock_python
from transformers import AutoModelForCausalLM

from lrc.errors import CheckpointError, RequestError
from lrc.export.base import formats
from lrc.export.write import export

EVEN = {"hidden_size": 64, "intermediate_size": 96}  # GPTQ packs 32 rows and 32 columns into whole words
RESULTS: dict[str, tuple[str, str, dict, dict]] = {
    "svd-llm": ("llama", "svd-llm", {"ratio": 0.3}, {}),
    "gpt2, narrow and low rank": ("gpt2", "lrc-fast", {"ratio": 0.3}, {}),
    "fused gate, narrow and low rank": ("phi3", "lrc-fast", {"ratio": 0.3}, {}),
    "narrow experts": ("mixtral", "lrc-fast", {"ratio": 0.3}, {}),
    "factors shared across layers": ("llama", "basis-sharing", {"ratio": 0.3}, {}),
    "dictionary": ("llama", "cospadi", {"ratio": 0.3}, {}),
    "dropped layer": ("llama", "block-influence", {"ratio": 0.3}, {}),
    "dropped sub-layers": ("llama", "finercut", {"ratio": 0.3}, {}),
    "codes with zeros": ("llama", "gptq", {"settings__group_size": 16}, EVEN),
    "three bits": ("llama", "rtn", {"settings__group_size": 8, "settings__bits": 3}, EVEN),
    "codes and corrections": (
        "llama", "qera", {"settings__group_size": 16, "settings__rank": 4, "settings__factor_bits": 8}, EVEN
    ),
    "trellis": ("llama", "trellis", {"settings__state_bits": 8, "propagate": "original"}, {}),
    "powers of two": ("llama", "rtn", {"settings__grid": "mxint", "settings__group_size": 16, "settings__bits": 8}, EVEN),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(tiny_checkpoints, tiny_text_file, tmp_path_factory):
    """A function name -> folder of a finished result, compressed once."""
    return compressed_once(RESULTS, tiny_checkpoints, tiny_text_file, tmp_path_factory)


def opened_without_lrc(folder: Path, file: Path, trust: bool = False) -> torch.Tensor:
    """Logits and tokens of an export in a process that has never imported lrc."""
    done = stock_python(
        """
        import sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        sys.modules["lrc"] = None
        trust = sys.argv[3] == "True"
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=trust).eval()
        AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=trust)
        with torch.no_grad():
            torch.save(model(torch.arange(3, 40)[None]).logits, sys.argv[2])
        assert model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False).shape == (1, 10)
        """,
        folder,
        file,
        trust,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(file)


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("name", RESULTS)
def test_a_dense_export_opens_everywhere(name, results, tmp_path):
    done = export(results(name), "dense", out=tmp_path / "dense")
    assert done.difference is not None and done.difference < 1e-5
    require_same(opened_without_lrc(done.folder, tmp_path / "logits"), logits(results(name)))
    config = json.loads((done.folder / "config.json").read_text())
    assert "quantization_config" not in config and not (done.folder / "lrc.json").exists()


@pytest.mark.parametrize(
    "name",
    ["narrow experts", "factors shared across layers", "dictionary", "dropped sub-layers", "codes and corrections", "trellis"],
)
def test_a_self_contained_export_carries_every_form(name, results, tmp_path):
    done = export(results(name), "self-contained", out=tmp_path / "own")
    require_same(opened_without_lrc(done.folder, tmp_path / "logits", trust=True), logits(results(name)))
    held = [load_file(file) for file in (done.folder / "model.safetensors", *sorted(results(name).glob("*.safetensors")))]
    own, *shards = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in held]
    assert own == sum(shards)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(done.folder, trust_remote_code=False)


@pytest.mark.parametrize("name", ["codes with zeros", "three bits", "codes and corrections", "powers of two"])
def test_compressed_tensors_opens_the_codes(name, results, tmp_path):
    pytest.importorskip("compressed_tensors")
    done = export(results(name), "compressed-tensors", out=tmp_path / "ct")
    require_same(opened_without_lrc(done.folder, tmp_path / "logits"), logits(results(name)))
    assert (done.folder / "adapter_model.safetensors").exists() == (name == "codes and corrections")


@pytest.mark.parametrize("name", ["codes with zeros", "three bits", "codes and corrections", "powers of two"])
def test_gptq_codes_mean_the_same_by_the_formats_formula(name, results, tmp_path):
    done = export(results(name), "gptq", out=tmp_path / "gptq")
    assert done.difference is not None and done.difference < 1e-5
    config = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == ("gptq" if config["sym"] else "gptq_v2")
    tensors = load_file(done.folder / "model.safetensors")
    rows, columns = 96, 64
    bits = config["bits"]
    assert tensors["model.layers.0.mlp.up_proj.qweight"].shape == (columns * bits // 32, rows)
    assert tensors["model.layers.0.mlp.up_proj.qzeros"].shape == (columns // config["group_size"], rows * bits // 32)


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_a_format_of_codes_refuses_what_has_none(to, results, tmp_path):
    with pytest.raises(RequestError, match=r"21 modules.*\n.*form 'low-rank': 21 modules, model\.layers\.0"):
        export(results("svd-llm"), to, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_matrix_of_other_sides_is_refused_by_gptq(tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, "rtn", settings__group_size=16)
    with pytest.raises(RequestError, match="no multiples of 32"):
        export(tmp_path / "out", "gptq")


def test_a_wrong_export_gets_no_name(results, tmp_path, monkeypatch):
    """An export whose logits differ is deleted: here one shard is changed before the check."""
    from lrc.export import write

    def spoiled(form, folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"] *= -1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return checked(form, folder)

    checked = write._checked
    monkeypatch.setattr(write, "_checked", spoiled)
    with pytest.raises(CheckpointError, match="logits of the export differ"):
        export(results("svd-llm"), "dense", out=tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []


def test_shards_have_the_size_that_is_asked_for_and_the_mode_of_the_umask(results, tmp_path):
    before = os.umask(0o022)
    try:
        done = export(results("svd-llm"), "dense", out=tmp_path / "dense", max_shard_bytes=100_000)
    finally:
        os.umask(before)
    shards = sorted(done.folder.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 120_000 for shard in shards)
    assert {stat.S_IMODE(path.stat().st_mode) for path in done.folder.iterdir()} == {0o644}
    require_same(opened_without_lrc(done.folder, tmp_path / "logits"), logits(results("svd-llm")))


def test_a_folder_with_files_is_not_written_over(results, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="not an empty folder"):
        export(results("svd-llm"), "dense", out=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_command_lists_formats_and_says_where_the_export_is(results, tmp_path):
    listed = run_lrc("export", results("svd-llm"))
    assert listed.code == 0 and [line.partition(":")[0] for line in listed.out.splitlines()] == sorted(formats())
    done = run_lrc("export", results("svd-llm"), "--to", "dense", "--out", tmp_path / "dense")
    assert done.code == 0 and "logits within" in done.out and str(tmp_path / "dense") in done.out
    wrong = run_lrc("export", results("svd-llm"), "--to", "dens")
    assert wrong.code == 2 and "dense" in wrong.err
    size = run_lrc("export", results("svd-llm"), "--to", "dense", "--out", tmp_path / "x", "--max-shard-size", "5")
    assert size.code == 2 and "--max-shard-size" in size.err


def test_a_result_in_half_precision_is_exported_in_any_dtype(tiny_checkpoints, tiny_text_file, tmp_path):
    compress(tiny_checkpoints("llama", dtype=torch.bfloat16), tmp_path / "out", tiny_text_file, "svd-llm", ratio=0.3)
    for dtype, most in ((torch.bfloat16, 0.05), (torch.float32, 1e-5)):
        done = export(tmp_path / "out", "dense", out=tmp_path / str(dtype), dtype=dtype)
        assert done.difference is not None and done.difference < most
        assert next(iter(load_file(done.folder / "model.safetensors").values())).dtype == dtype
