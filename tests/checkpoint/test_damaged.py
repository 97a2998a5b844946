"""Damaged checkpoints, hostile ones, and damaged files of an earlier run: through the real command on tiny models."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import contents, lrc_ok, run_lrc
from safetensors.torch import load_file, save_file

import lrc.run.output
from lrc.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama", num_hidden_layers=2)


# ---- damaged checkpoints

TENSOR = "model.layers.1.mlp.up_proj.weight"


def shard_of(folder: Path, tensor: str = TENSOR) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def edit_index(folder: Path, edit: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensor(folder: Path, edit: Callable[[torch.Tensor], torch.Tensor], name: str = TENSOR) -> None:
    path = shard_of(folder, name)
    tensors = load_file(path)
    save_file(tensors | {name: edit(tensors[name]).contiguous()}, path, metadata={"format": "pt"})


def truncate(folder: Path) -> str:
    os.truncate(shard_of(folder), shard_of(folder).stat().st_size - 100)
    return shard_of(folder).name


def empty(folder: Path) -> str:
    os.truncate(shard_of(folder), 0)
    return shard_of(folder).name


def corrupt_header(folder: Path) -> str:
    with shard_of(folder).open("r+b") as file:
        file.seek(8)
        file.write(b"\xfe" * 64)
    return shard_of(folder).name


def garbage(folder: Path) -> str:
    with shard_of(folder).open("r+b") as file:
        header = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(header))[TENSOR]["data_offsets"]
        file.seek(8 + header + start + 512)
        file.write(b"\xff" * 64)
    return f"16 of 3840 values of '{TENSOR}' are NaN or infinite"


def missing_shard(folder: Path) -> str:
    name = shard_of(folder).name
    shard_of(folder).unlink()
    return name


def missing_tensor(folder: Path) -> str:
    edit_index(folder, lambda where: where.pop(TENSOR))
    return TENSOR


def promised_tensor(folder: Path) -> str:
    edit_index(folder, lambda where: where.update({"model.layers.9.norm.weight": shard_of(folder).name}))
    return "model.layers.9.norm.weight"


def wrong_shape(folder: Path) -> str:
    edit_tensor(folder, lambda weight: weight[:-1])
    return f"'{TENSOR}' has shape (79, 48), the model of config.json wants (80, 48)"


def transposed(folder: Path) -> str:
    edit_tensor(folder, lambda weight: weight.T)
    return f"'{TENSOR}' has shape (48, 80)"


def a_nan(folder: Path) -> str:
    edit_tensor(folder, lambda weight: weight.index_fill(0, torch.tensor(3), float("nan")))
    return f"48 of 3840 values of '{TENSOR}'"


def an_infinity_outside_the_layers(folder: Path) -> str:
    edit_tensor(folder, lambda weight: weight.fill_(float("inf")), "model.norm.weight")
    return "'model.norm.weight'"


def index_is_no_json(folder: Path) -> str:
    (folder / INDEX).write_text("<html>404</html>")
    return INDEX


def index_points_outside(folder: Path) -> str:
    edit_index(folder, lambda where: where.update({TENSOR: "../../etc/passwd"}))
    return "../../etc/passwd"


DAMAGES = [
    truncate, empty, corrupt_header, garbage, missing_shard, missing_tensor, promised_tensor, wrong_shape, transposed, a_nan,
    an_infinity_outside_the_layers, index_is_no_json, index_points_outside,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint(damage, damaged, request_for, tmp_path):
    named = damage(damaged)
    result = run_lrc(*request_for(damaged, tmp_path / "out"))
    assert result.code == 1, result.err
    assert named in result.err
    assert result.told.count("\n") == 2, "what happened, and the remedy"
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "damage", [truncate, corrupt_header, missing_tensor, wrong_shape, transposed], ids=lambda d: d.__name__
)
def test_what_headers_tell_is_said_before_any_work(damage, damaged, request_for, tmp_path):
    named = damage(damaged)
    result = run_lrc("plan", damaged, "--ratio", 0.3)
    assert result.code == 1
    assert named in result.err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_file_beside_the_weights_that_cannot_be_read(file, damaged, request_for, tmp_path):
    (damaged / file).write_text('{"half": ')
    result = run_lrc(*request_for(damaged, tmp_path / "out"))
    assert result.code == 2
    assert str(damaged) in result.err
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_float16(damaged, request_for, tmp_path):
    edit_tensor(damaged, lambda weight: weight * 1e5, "model.layers.1.mlp.down_proj.weight")
    edit_tensor(damaged, lambda weight: weight * 1e3, TENSOR)
    result = run_lrc(*request_for(damaged, tmp_path / "out", "--dtype", "float16"))
    assert result.code == 1
    assert "model.layers.1" in result.err and "--dtype bfloat16" in result.err
    assert not (tmp_path / "out" / "config.json").exists()
    lrc_ok(*request_for(damaged, tmp_path / "bfloat16", "--dtype", "bfloat16"))


def test_a_result_that_does_not_pass_its_check_never_looks_finished(model, request_for, tmp_path, monkeypatch):
    out = tmp_path / "out"
    seen = []

    def failing(folder: Path, **options: object) -> None:
        seen.append(sorted(contents(folder)))
        raise CheckpointError("The check failed.", "A remedy.")

    with monkeypatch.context() as patched:
        patched.setattr(lrc.run.output, "verify", failing)
        result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert "The check failed." in result.err
    assert "config.json" not in seen[0] and not (out / "config.json").exists()
    lrc_ok(*request_for(model, out))


# ---- hostile checkpoints


class Sting:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_not_opened(name, damaged, request_for, tmp_path):
    for path in [*damaged.glob("*.safetensors"), damaged / INDEX]:
        path.unlink()
    (damaged / name).write_bytes(pickle.dumps(Sting(tmp_path / "stung")))
    for command in (request_for(damaged, tmp_path / "out"), ["eval", damaged, "--tasks", f"text:{damaged / 'config.json'}"]):
        result = run_lrc(*command)
        assert result.code == 2
        assert not (tmp_path / "stung").exists()
        assert not (tmp_path / "out").exists()
    assert name in run_lrc(*request_for(damaged, tmp_path / "out")).err


@pytest.mark.parametrize("model_type", ["llama", "of_its_own"])
def test_code_in_the_checkpoint_is_not_run(model_type, damaged, request_for, tmp_path):
    stung = tmp_path / "stung"
    for part in ("configuration", "modeling", "tokenization"):
        (damaged / f"{part}_evil.py").write_text(f"from pathlib import Path\nPath({str(stung)!r}).touch()\n")
    config = json.loads((damaged / "config.json").read_text()) | {"model_type": model_type}
    config["auto_map"] = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (damaged / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((damaged / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Slow", "tokenization_evil.Fast"]}
    (damaged / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    result = run_lrc(*request_for(damaged, tmp_path / "out"))
    assert not stung.exists()
    if model_type == "of_its_own":
        assert result.code == 2
        assert "--trust-remote-code" in result.err


# ---- damaged files of an earlier run


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (("--recipe", "sleb", "--set", "depth.protect_first=0", "--set", "depth.protect_last=0"), "trials/*.json"),
        (("--recipe", "svd-llm", "--set", "allocation=kl"), "nats-*.json"),
    ],
)
@pytest.mark.parametrize("left", [b"", b'{"0,1": 0.2, "', b'{"0,1": {"loss": []}}', b"[1]"])
def test_what_was_measured_is_asked_for_again_where_its_file_is_damaged(left, settings, kept, model, request_for, tmp_path):
    """A power cut can leave a file of no bytes under its final name, an editor or another lrc something else."""
    more = ("--statistics", tmp_path / "statistics", *settings)
    lrc_ok(*request_for(model, tmp_path / "first", "--ratio", 0.5, *more))
    file = next((tmp_path / "statistics").glob(kept))
    file.write_bytes(left)
    result = run_lrc(*request_for(model, tmp_path / "second", "--ratio", 0.5, *more))
    assert result.code == 1 and str(file) in result.err and "Delete it" in result.err
    assert result.told.count("\n") == 2, "what happened, and the remedy"
    file.unlink()
    lrc_ok(*request_for(model, tmp_path / "second", "--ratio", 0.5, *more))
    one, two = (load_all(tmp_path / out) for out in ("first", "second"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
