"""What people really hand in: mistyped names, damaged files beside the weights, folders in use, text that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import contents, lrc_ok, run_lrc
from safetensors.torch import load_file, save_file
from tiny import tiny_text
from transformers import AutoTokenizer

from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.model.view import ModelView

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama")


@pytest.fixture
def copied(tiny_checkpoints, tmp_path) -> Callable[..., Path]:
    """A function (family, **changes) -> a copy of a tiny checkpoint to damage."""

    def copy(family: str = "llama", **changes: object) -> Path:
        return shutil.copytree(tiny_checkpoints(family, **changes), tmp_path / "copied")

    return copy


@pytest.fixture(scope="module")
def other_text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "other.txt"
    file.write_text(tiny_text(2000, seed=9))
    return file


@pytest.fixture(scope="module")
def whole(model, tiny_text_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    lrc_ok(*compression(model, out, tiny_text_file, "--max-shard-size", "60kB"))
    return out


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A finished result to damage."""
    return shutil.copytree(whole, tmp_path / "finished")


def compression(model: Path, out: Path, text: Path, *more: object, length: int = 48) -> list[object]:
    sizes = ["--samples", 4, "--length", length]
    told = ["--recipe", "svd-llm", "--ratio", 0.3, "--calibration", f"text:{text}"]
    return ["compress", model, "--out", out, *told, *sizes, *more]


def evaluation(model: Path, text: Path, *more: object) -> list[object]:
    return ["eval", model, "--tasks", f"text:{text}", "--length", 32, "--max-windows", 1, *more]


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


# ---- the model's name and configuration


@pytest.mark.parametrize("name", ["my--model", "model.", "someone/model.git", "x" * 120, "-"])
def test_a_name_that_no_model_of_the_hub_can_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_lrc("plan", name, "--ratio", 0.3)
    assert result.code == 2
    assert f"There is no folder '{name}'" in result.err


def test_an_empty_name(tmp_path, monkeypatch, model, other_text):
    monkeypatch.chdir(tmp_path)
    assert "name of the model is empty" in run_lrc("plan", "", "--ratio", 0.3).err
    assert "name of the model is empty" in run_lrc(*evaluation(model, other_text, "--baseline", "")).err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"num_attention_heads": 5}, "multiple of the number of attention heads (5)"),
        ({"hidden_act": "nonsense"}, "nonsense"),
        ({"dtype": "float61"}, "float61"),
    ],
)
def test_a_configuration_with_a_wrong_value(changes, said, copied):
    folder = copied()
    edit_config(folder, lambda config: config.update(changes))
    result = run_lrc("plan", folder, "--ratio", 0.3)
    assert result.code == 2
    assert said in result.err and "config.json" in result.err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_configuration_without_a_dtype_does_not_double_the_model(dtype, copied):
    """The ratio is of the bytes at the checkpoint's own dtype, which the shards' headers tell."""
    folder = copied(dtype=dtype)
    with_dtype = ModelView(locate(str(folder))).nbytes
    edit_config(folder, lambda config: config.pop("dtype"))
    view = ModelView(locate(str(folder)))
    assert view.dtype == dtype and view.nbytes == with_dtype
    assert open_model(str(folder))[0].dtype == dtype


@pytest.mark.parametrize("index", [b"\xff\xfe\x80", b'{"weight_map": {"a": 3}}', b'{"weight_map": ["a"]}'])
def test_an_index_that_is_none(index, copied):
    folder = copied()
    (folder / INDEX).write_bytes(index)
    result = run_lrc("plan", folder, "--ratio", 0.3)
    assert result.code == 1
    assert f"{folder / INDEX} is not an index of shards" in result.err


@pytest.mark.parametrize("content", [b"", b"hello" * 99, b"GGUF\x03\0\0\0" + b"\x05\0\0\0\0\0\0\0" * 2 + b"\x09"])
def test_a_file_that_is_no_whole_gguf(content, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    result = run_lrc("plan", file, "--ratio", 0.3)
    assert result.code == 1
    assert f"{file} ({len(content)} bytes) cannot be read as GGUF" in result.err
    assert "remote" not in result.err


# ---- weights


def test_what_the_model_has_no_place_for_is_not_lost_in_silence(copied, tiny_text_file, tmp_path):
    """Fewer layers in config.json than in the file, and a tower of another modality."""
    folder = copied(shard="1GB")
    edit_tensors(folder, lambda tensors: tensors.update({"vision.tower.weight": torch.ones(50, 50)}))
    edit_config(folder, lambda config: config.update(num_hidden_layers=2, layer_types=None))
    planned = lrc_ok("plan", folder, "--ratio", 0.3, "--verbose")
    (line,) = [line for line in planned.splitlines() if line.startswith("left out: ")]
    assert "vision.tower.weight" in line and "model.layers.2.mlp.up_proj.weight" in line
    lrc_ok(*compression(folder, tmp_path / "out", tiny_text_file))
    left_out = {entry["name"]: entry["numel"] for entry in json.loads((tmp_path / "out" / "lrc.json").read_text())["left_out"]}
    assert left_out["vision.tower.weight"] == 2500 and len(left_out) == 10


def test_evaluating_a_checkpoint_that_lacks_a_tensor_is_no_measurement_of_random_weights(copied, other_text):
    folder = copied(shard="1GB")
    edit_tensors(folder, lambda tensors: tensors.pop(TENSOR))
    result = run_lrc(*evaluation(folder, other_text))
    assert result.code == 1
    assert f"1 tensors of the model are in no file, '{TENSOR}' first" in result.err


def test_evaluating_a_tensor_of_another_shape_names_it(copied, other_text):
    folder = copied(shard="1GB")
    edit_tensors(folder, lambda tensors: tensors.update({TENSOR: tensors[TENSOR][:-1].clone()}))
    result = run_lrc(*evaluation(folder, other_text))
    assert result.code == 1
    assert f"'{TENSOR}' has shape (79, 48), the model of config.json wants (80, 48)" in result.err


def test_evaluating_a_truncated_shard_names_it(copied, other_text):
    folder = copied()
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    result = run_lrc(*evaluation(folder, other_text))
    assert result.code == 1
    assert str(shard) in result.err and "truncated or corrupt" in result.err


# ---- text that does not fit the model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("source", ["text", "self"])
def test_samples_longer_than_the_positions(family, source, tiny_checkpoints, tiny_text_file, tmp_path):
    text = f"text:{tiny_text_file}" if source == "text" else "self"
    result = run_lrc(
        "compress", tiny_checkpoints(family), "--out", tmp_path / "out", "--recipe", "svd-llm", "--ratio", 0.3,
        "--calibration", text, "--samples", 1, "--length", 300,
    )  # fmt: skip
    assert result.code == 2
    assert "calibration.length 300 is more than the 256 positions" in result.err


def test_a_tokenizer_of_another_model(copied, tiny_text_file, tmp_path):
    folder = copied()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["the quick", "owls watch"])
    tokenizer.save_pretrained(folder)
    result = run_lrc(*compression(folder, tmp_path / "out", tiny_text_file))
    assert result.code == 2
    assert "the model knows tokens 0 to 319" in result.err


def test_a_text_that_is_too_short_for_the_samples_is_told(model, tmp_path):
    (tmp_path / "short.txt").write_text(tiny_text(60))
    printed = lrc_ok(*compression(model, tmp_path / "out", tmp_path / "short.txt"))
    assert "short for 4 samples: they share tokens" in printed


# ---- recipes that look at no text


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("rtn", []), ("lqer", ["--set", "settings.rank=4"]), ("zeroquant-v2", []), ("svd", ["--ratio", 0.3]), ("welore", [])],
)
def test_a_recipe_that_looks_at_no_text_needs_none(recipe, more, model, tmp_path):
    """The hub is out of reach here, and these recipes calibrate on WikiText-2 where they do not say otherwise."""
    out, settings = tmp_path / "out", ["--set", "calibration.source=wikitext2"]
    printed = lrc_ok("compress", model, "--recipe", recipe, "--out", out, *more, *settings)
    assert "no calibration" in printed.splitlines()[0]
    record = json.loads((out / "lrc.json").read_text())
    assert record["calibration"] == {"hash": "", "provenance": []}
    assert {target["tokens"] for target in record["targets"]} == {None}
    lrc_ok("verify", out)


# ---- folders and files in use


def test_a_folder_of_statistics_that_is_a_model_is_left_alone(model, copied, tiny_text_file, tmp_path):
    folder = copied()
    before = contents(folder)
    result = run_lrc(*compression(model, tmp_path / "out", tiny_text_file, "--statistics", folder))
    assert result.code == 2
    assert f"{folder} holds other files" in result.err and "--statistics" in result.err
    assert contents(folder) == before


def test_statistics_of_another_text_take_the_losses_measured_on_the_old_one_with_them(model, tiny_text_file, tmp_path):
    """A folder used for a second calibration gives what a fresh one gives."""
    shared = tmp_path / "statistics"
    other = tmp_path / "other.txt"
    other.write_text(tiny_text_file.read_text()[::-1])
    more = ["--set", "allocation=spectrum", "--statistics"]
    lrc_ok(*compression(model, tmp_path / "first", tiny_text_file, *more, shared))
    lrc_ok(*compression(model, tmp_path / "second", other, *more, shared))
    lrc_ok(*compression(model, tmp_path / "fresh", other, *more, tmp_path / "fresh-statistics"))
    assert contents(tmp_path / "second") == contents(tmp_path / "fresh")
    curves = {path.name: json.loads(path.read_text()) for path in shared.glob("*.curves-*.json")}
    assert curves == {p.name: json.loads(p.read_text()) for p in (tmp_path / "fresh-statistics").glob("*.curves-*.json")}


def test_a_results_file_that_cannot_be_written_is_told_before_the_work(model, other_text, tmp_path, monkeypatch):
    def measure(*_: object, **__: object) -> None:
        raise AssertionError("hours of evaluation")

    monkeypatch.setattr("lrc.evaluation.evaluate.measure", measure)
    result = run_lrc(*evaluation(model, other_text, "--json", tmp_path))
    assert result.code == 2
    assert f"--json {tmp_path} is a folder" in result.err


def test_a_results_file_on_a_full_disk_leaves_the_numbers_on_the_screen(model, other_text):
    result = run_lrc(*evaluation(model, other_text, "--json", "/dev/full"))
    assert result.code == 1
    assert "Cannot write --json /dev/full" in result.err and "table above" in result.err
    assert "token-ppl@32" in result.out


def test_a_sweep_into_a_file(model, tiny_text_file, tmp_path):
    (tmp_path / "file").write_text("a file")
    result = run_lrc("sweep", model, "--recipes", "svd", "--out", tmp_path / "file", "--tasks", f"text:{tiny_text_file}")
    assert result.code == 2
    assert f"Cannot write {tmp_path / 'file'}" in result.err
    assert (tmp_path / "file").read_text() == "a file"


# ---- results that were changed


@pytest.mark.parametrize(
    "edit",
    [
        lambda modules: modules.update({"model.layers.0.mlp.up_proj": "x"}),
        lambda modules: modules["model.layers.0.mlp.up_proj"].update(rank="3"),
        lambda modules: modules["model.layers.0.mlp.up_proj"].update(kind="nonsense"),
        lambda modules: modules["model.layers.0.mlp.up_proj"].update(kind="quantized", grid={"bitz": 3}),
        lambda modules: modules["model.layers.0.mlp.up_proj"].update(kind="quantized", grid={"bits": 9}),
        lambda modules: modules.update({"model.layers.9.mlp.up_proj": {"kind": "low-rank", "rank": 3, "bias": False}}),
    ],
)
def test_a_configuration_that_names_forms_which_cannot_be(edit, finished, other_text):
    edit_config(finished, lambda config: edit(config["quantization_config"]["modules"]))
    result = run_lrc(*evaluation(finished, other_text))
    assert result.code == 1
    assert "quantization_config" in result.err


@pytest.mark.parametrize("record", ['{"schema": 1}', "[]", '{"schema": 1, "identity": {}, "calibration": 3}'])
def test_a_record_that_is_damaged(record, finished, other_text):
    (finished / "lrc.json").write_text(record)
    for command in (["verify", finished], evaluation(finished, other_text)):
        result = run_lrc(*command)
        assert result.code == 1
        assert str(finished / "lrc.json") in result.err


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
def test_verify_notices_a_changed_file_beside_the_shards(name, finished):
    """Another rotary base in config.json is another model, and its logits are as finite as before."""
    lrc_ok("verify", finished)
    (finished / name).write_text((finished / name).read_text() + "\n")
    result = run_lrc("verify", finished)
    assert result.code == 1
    assert f"{finished / name} has changed since it was written" in result.err
    (finished / name).unlink()
    assert name in run_lrc("verify", finished).err
