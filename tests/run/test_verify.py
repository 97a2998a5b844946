"""`lrc verify`: whatever loading would read is what lrc wrote, the record and the model card included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import lrc_ok, run_lrc
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def finished(tiny_checkpoints, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    lrc_ok("compress", tiny_checkpoints("llama", num_hidden_layers=2), "--recipe", "svd", "--ratio", 0.3, "--out", out,
           "--max-shard-size", "60kB")  # fmt: skip
    return out


@pytest.fixture
def result(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "result")


def refused(folder: Path) -> str:
    told = run_lrc("verify", folder)
    assert told.code == 1 and not told.out, told
    assert told.err.count("\n") == 2, "what happened, and the remedy"
    return told.err


def edit_record(folder: Path, edit: Callable[[dict], object]) -> None:
    record = json.loads((folder / "lrc.json").read_text())
    edit(record)
    (folder / "lrc.json").write_text(json.dumps(record, indent=2) + "\n")


def as_older(record: dict) -> None:
    """A record of the lrc that knew no digest."""
    for key in ("digest", "card"):
        del record[key]


WEIGHTS = ["model.safetensors", "extra.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "x.pt", "x.gguf",
           "consolidated.00.pth", "tf_model.h5"]  # fmt: skip
READ = ["adapter_config.json", "pytorch_model.bin.index.json", "model.fp16.safetensors.index.json", "hf_quant_config.json",
        "modeling_evil.py", "preprocessor_config.json", "chat_template.json", "additional_chat_templates/tool.jinja",
        "custom_generate/generate.py", "vocab.json"]  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS + READ)
def test_a_file_that_loading_may_read_and_lrc_did_not_write(name, result):
    (result / name).parent.mkdir(exist_ok=True)
    (result / name).write_bytes(b"{}")
    message = refused(result)
    assert name in message and "Move them" in message


def test_files_that_loading_does_not_read_are_listed(result):
    for name in (".gitattributes", "notes.txt", "results.json"):
        (result / name).write_text("mine")
    printed = lrc_ok("verify", result)
    assert "not written by lrc, and not read in loading: .gitattributes, notes.txt, results.json" in printed


def test_weights_beside_an_unfinished_result_are_refused_before_any_work(result, tiny_checkpoints, no_forward):
    (result / "model.safetensors").write_bytes(b"")
    model = tiny_checkpoints("llama", num_hidden_layers=2)
    again = run_lrc("compress", model, "--recipe", "svd", "--ratio", 0.4, "--out", result, "--restart")
    assert again.code == 2 and "model.safetensors" in again.err


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("left", [{}, {"model-00001-of-00002.safetensors": {"sha256": "", "nbytes": 0}}])
def test_a_list_of_shards_that_is_not_the_index(left, older, result):
    def edit(record: dict) -> None:
        record["shards"] = left
        if older:
            as_older(record)

    edit_record(result, edit)
    assert "lrc.json" in refused(result)


def test_a_list_of_shards_that_is_there_twice(result):
    edit_record(result, as_older)
    text = (result / "lrc.json").read_text()
    (result / "lrc.json").write_text(text.replace('"shards": {', '"shards": {}, "shards": {', 1))
    assert "'shards' is given twice" in refused(result)


def test_an_index_that_names_another_place(result):
    """An older record covers no index by a hash; it is compared with the shards all the same."""
    edit_record(result, lambda record: (as_older(record), record["sha256"].pop(INDEX)))
    index = json.loads((result / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    moved = load_file(result / files[0])[name]
    held = load_file(result / files[1])
    save_file(held | {name: moved + 1}, result / files[1], metadata={"format": "pt"})
    assert "bytes were written" in refused(result) or files[1] in refused(result)
    (result / INDEX).write_text(json.dumps(index | {"weight_map": dict.fromkeys(index["weight_map"], files[0])}))
    assert "is in one of them only" in refused(result)


def test_every_byte_of_the_record_is_covered(result):
    """A bit is flipped in a sample of all bytes: each is noticed."""
    path = result / "lrc.json"
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = [*torch.randint(len(whole), (20,), generator=generator).tolist(), 4, 5, 12, 20, 80, len(whole) - 1]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        assert "lrc.json" in refused(result), place
    path.write_bytes(whole)
    lrc_ok("verify", result)


def test_a_record_that_was_changed_and_kept_valid(result):
    edit_record(result, lambda record: record.update(ratio=0.9))
    assert "its own digest differs" in refused(result)
    edit_record(result, lambda record: record.pop("digest"))
    assert "its own digest differs" in refused(result)


def test_an_edited_model_card(result):
    (result / "README.md").write_text("My own words.")
    message = refused(result)
    assert "README.md, the model card, has changed" in message and "everything else is as lrc wrote it" in message
    assert "--edited-card" in message
    lrc_ok("verify", result, "--edited-card")
    (result / "README.md").unlink()
    assert "is missing" in refused(result)


def test_an_older_result_says_what_is_not_covered(result):
    edit_record(result, as_older)
    (result / "README.md").write_text("My own words.")
    printed = lrc_ok("verify", result)
    assert "whole." in printed and "note: lrc.json and README.md are not covered by a hash" in printed


def test_eval_reads_what_verify_checked(result, text):
    shutil.copy(sorted(result.glob("model-*"))[0], result / "model.safetensors")
    told = run_lrc("eval", result, "--tasks", text, "--length", 64)
    assert told.code == 2 and "two sets of weights" in told.err
