"""Files that belong to a model beside its weights: what a result gets, what it does not get, and that this is said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from commandline import contents, lrc_ok, run_lrc
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from lrc.checkpoint import beside
from lrc.checkpoint.beside import files_beside, hub_leaves

COPIED = [
    "tokenizer.json", "tokenizer.model", "vocab.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/tool_use.jinja", "generation_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json", "params.json", "1_Pooling/config.json", "LICENSE",
    "USE_POLICY.md", "some/deeper/folder/words.txt", "a name of a kind that nobody knows.xyz",
]  # fmt: skip
WRITTEN_BY_LRC = ["config.json", "model.safetensors", "model.safetensors.index.json", "lrc.json"]
LEFT = {
    "weights, training states, archives": [
        "pytorch_model.bin", "onnx/", "original/", "model-q4.gguf", "optimizer.pt", "consolidated.safetensors", "runs.tar",
        "checkpoints/step-1/",
    ],
    "about the weights of the original": [
        "pytorch_model.bin.index.json", "hf_quant_config.json", "quantize_config.json", "adapter_config.json",
    ],
    "code, which is not trusted": ["modeling_own.py", "kernels/fast.cu", "setup.sh"],
    "the original's card": ["README.md", "assets/loss.png"],
}  # fmt: skip
INSIDE = {"onnx/": "model.onnx", "original/": "consolidated.pth", "checkpoints/step-1/": "model.safetensors"}


def put(folder: Path, name: str, content: str = "x") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name in [*COPIED, *WRITTEN_BY_LRC, ".git/config", ".cache/huggingface/x.json", ".gitattributes"]:
        put(folder, name)
    for name in (name for names in LEFT.values() for name in names):
        put(folder, name + INSIDE.get(name, ""))
    put(folder, "original/tokenizer.model")
    return folder


def test_the_rule(checkpoint):
    found = files_beside(checkpoint)
    assert sorted(found.files) == sorted(COPIED)
    assert {reason: sorted(names) for reason, names in found.left_out.items()} == {
        reason: sorted(names) for reason, names in LEFT.items()
    }
    trusted = files_beside(checkpoint, code=True)
    assert set(trusted.files) - set(found.files) == set(LEFT["code, which is not trusted"])


def test_files_of_any_size_and_number_stay_within_stated_limits(checkpoint, monkeypatch):
    with (checkpoint / "huge.txt").open("wb") as file:
        file.truncate(beside.MOST_BYTES + 1)
    assert files_beside(checkpoint).left_out["larger than 64 MiB"] == ["huge.txt"]
    monkeypatch.setattr(beside, "MOST_FILES", 3)
    found = files_beside(checkpoint)
    assert len(found.files) == 3 and len(found.left_out["past 3 files or 256 MiB"]) == len(COPIED) - 3
    monkeypatch.setattr(beside, "_MOST_LOOKED_AT", 5)
    assert "past 5 files and folders" in files_beside(checkpoint).left_out


def test_links_lead_to_where_the_checkpoint_lies_and_nowhere_else(checkpoint, tmp_path):
    """A snapshot in the hub's cache, a folder of links to a model elsewhere, and links to what is no part of a model."""
    elsewhere = shutil.move(checkpoint, tmp_path / "home" / "model")
    secret, hidden = put(tmp_path / "home", "secret.txt"), put(elsewhere, ".ssh/key")
    view = tmp_path / "view"
    view.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates"):
        (view / name).symlink_to(elsewhere / name)
    for name, target in {"passwd": "/etc/passwd", "secret.txt": secret, "key": hidden, "gone": "nowhere"}.items():
        (view / name).symlink_to(target)
    (view / "loop").mkdir()
    (view / "loop" / "again").symlink_to(view / "loop")
    os.mkfifo(view / "pipe")
    found = files_beside(view)
    assert sorted(found.files) == ["additional_chat_templates/tool_use.jinja", "tokenizer.json"]
    assert found.left_out == {
        "a link that leads out of the checkpoint": ["key", "passwd", "secret.txt"],
        "a link to nothing": ["gone"],
        "a link to a folder that it lies in": ["loop/again/"],
        "no file": ["pipe"],
    }
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "1f"
    for number, name in enumerate(["config.json", "tekken.json", "additional_chat_templates/rag.jinja"]):
        blob, link = put(blobs, str(number)), snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert sorted(files_beside(snapshot).files) == ["additional_chat_templates/rag.jinja", "tekken.json"]


def test_the_hub_is_asked_for_what_is_copied(checkpoint):
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    fetched = set(filter_repo_objects(names, ignore_patterns=hub_leaves()))
    assert {*COPIED, "config.json", "model.safetensors", "model.safetensors.index.json", "modeling_own.py"} <= fetched
    assert not {name for name in fetched if name.endswith((".bin", ".pth", ".gguf", ".onnx", ".png")) or "step-1" in name}, (
        "gigabytes that nobody reads"
    )


@pytest.fixture
def with_files(tiny_checkpoints, tmp_path) -> Path:
    folder = shutil.copytree(tiny_checkpoints("llama", num_hidden_layers=2), tmp_path / "with_files")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "D{{messages}}", "tool_use": "T{{messages}}"}
    tokenizer.save_pretrained(folder)
    put(folder, "video_preprocessor_config.json", json.dumps({"auto_map": {"AutoVideoProcessor": "own.Own"}, "size": 3}))
    for name in ("processor/words.tiktoken", "README.md", "pytorch_model.bin", "quant_config.json"):
        put(folder, name)
    return folder


def test_a_result_has_them_and_is_checked_and_cleared_with_them(with_files, request_for, tmp_path):
    out = tmp_path / "out"
    printed = lrc_ok(*request_for(with_files, out))
    assert "left out: 1 of the files beside the weights (weights, training states, archives): pytorch_model.bin" in printed
    assert AutoTokenizer.from_pretrained(out).chat_template == {"default": "D{{messages}}", "tool_use": "T{{messages}}"}
    assert json.loads((out / "video_preprocessor_config.json").read_text()) == {"size": 3}, "code that was not trusted"
    held = json.loads((out / "lrc.json").read_text())
    for name in ("additional_chat_templates/tool_use.jinja", "processor/words.tiktoken"):
        assert (out / name).read_bytes() == (with_files / name).read_bytes()
        assert name in held["files"] and name in held["sha256"]
    assert held["files_left_out"]["about the weights of the original"] == ["quant_config.json"]
    assert "compressed by lrc" in (out / "README.md").read_text()
    lrc_ok("verify", out)
    made = contents(out)
    (out / "processor" / "words.tiktoken").write_text("other")
    refused = run_lrc("verify", out)
    assert refused.code == 1 and "words.tiktoken has changed" in refused.err
    put(out, "additional_chat_templates/mine.txt")
    lrc_ok(*request_for(with_files, out, "--restart"))
    assert contents(out) == made | {"additional_chat_templates/mine.txt": contents(out)["additional_chat_templates/mine.txt"]}
