"""Kills, and another request or process on the same folder: through the real command on tiny models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commandline import contents, lrc_ok, run_lrc, untouched
from faults import killed_before
from tiny import tiny_text

from lrc.calibrate.store import StatsStore
from lrc.checkpoint.artifact import Artifact
from lrc.checkpoint.atomic import read_json, replacing, write_json
from lrc.checkpoint.folder import JOURNAL
from lrc.commands.common.terminal import Progress

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama", num_hidden_layers=2)


# ---- killed


def journalled(folder: Path) -> list[str]:
    """The parts whose line in the journal is complete."""
    if not (folder / JOURNAL).is_file():
        return []
    lines = (folder / JOURNAL).read_bytes().split(b"\n")[:-1]
    return [entry["file"] for line in lines if "file" in (entry := json.loads(line))]


@pytest.mark.parametrize("propagate", ["original", "compressed"])
def test_killed_before_any_change_to_the_disk_it_continues_to_the_same_bytes(
    propagate, model, request_for, uninterrupted, tmp_path
):
    expected = uninterrupted(propagate)
    operation = 1
    while True:
        out = tmp_path / str(operation)
        arguments = request_for(model, out, "--propagate", propagate)
        if not killed_before(operation, out, arguments):
            break
        if finished := (out / "config.json").exists():  # whatever looks finished is finished
            assert set(expected) <= set(contents(out))
        done = journalled(out)
        printed = lrc_ok(*arguments)
        assert contents(out) == expected, f"killed before change {operation}"
        left = 0 if finished else max(0, 2 - len(done))
        assert printed.count("relative error") == left, "a finished layer was solved again"
        shutil.rmtree(out)
        operation += 2  # test_interrupted.py has every one
        if propagate == "compressed" and len(done) == 3:  # from here on there is nothing left to propagate
            break
    assert operation > (50 if propagate == "original" else 20), "the matrix has lost its points"


@pytest.mark.parametrize(
    ("moment", "propagate"), [("layer 1 is in the journal", "compressed"), ("lrc.json appears", "original")]
)
def test_sigkill_of_a_real_process(moment, propagate, request_for, tiny_checkpoints, tiny_text_file, tmp_path):
    deep = tiny_checkpoints("llama", num_hidden_layers=8)
    arguments = {name: request_for(deep, tmp_path / name, "--propagate", propagate) for name in ("killed", "whole")}
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "lrc.cli", *map(str, arguments["killed"])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        while process.poll() is None:
            if len(journalled(out)) >= 2 if moment.startswith("layer") else (out / "lrc.json").exists():
                process.kill()
                break
            time.sleep(0.0005)
    finally:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode in (-signal.SIGKILL, 0), errors.decode()
    done = journalled(out)
    if moment.startswith("layer"):
        assert process.returncode == -signal.SIGKILL
        assert 2 <= len(done) < 9
        assert not (out / "config.json").exists()
    printed = lrc_ok(*arguments["killed"])
    lrc_ok(*arguments["whole"])
    assert contents(out) == contents(tmp_path / "whole")
    if len(done) < 9 and moment.startswith("layer"):
        assert printed.count("finished earlier, replayed") == len(done)


@pytest.fixture
def half_done(model, request_for, tmp_path) -> tuple[Path, list[object]]:
    """A run that was killed between its layers, and its command."""
    out = tmp_path / "half"
    arguments = request_for(model, out)
    operation = 1
    while len(journalled(out)) != 1:
        shutil.rmtree(out, ignore_errors=True)
        assert killed_before(operation, out, arguments)
        operation += 1
    return out, arguments


def test_half_a_journal_line_and_half_a_shard_are_thrown_away(half_done, uninterrupted):
    out, arguments = half_done
    with (out / JOURNAL).open("ab") as journal:
        journal.write(b'{"key": "model.layers.1", "file": "lrc.part-0000')
    (out / "lrc.part-00002-of-00003.safetensors.lrc-partial").write_bytes(b"\0" * 100)
    (out / "lrc.part-00002-of-00003.safetensors").write_bytes(b"\0" * 100)  # renamed, but never journalled
    operation = 3
    while len(journalled(out)) != 2:  # killed once more: what came after the half line counts
        assert killed_before(operation, out, arguments)
        operation += 1
    assert "relative error" not in lrc_ok(*arguments), "a finished layer was solved again"
    assert contents(out) == uninterrupted()


def test_zeros_that_a_power_cut_left_in_the_journal_are_thrown_away(half_done, uninterrupted):
    out, arguments = half_done
    with (out / JOURNAL).open("ab") as journal:
        journal.write(b"\0" * 64 + b"\n")
    lrc_ok(*arguments)
    assert contents(out) == uninterrupted()


def test_a_finished_shard_that_was_damaged_since_is_made_again(half_done, uninterrupted):
    out, arguments = half_done
    shard = out / journalled(out)[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    lrc_ok(*arguments)
    assert contents(out) == uninterrupted()


def test_interrupted_by_ctrl_c_says_that_the_same_command_continues(model, request_for, uninterrupted, tmp_path, monkeypatch):
    arguments = request_for(model, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "_layer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        result = run_lrc(*arguments)
    assert result.code == 130
    assert "the same command continues" in result.err
    lrc_ok(*arguments)
    assert contents(tmp_path / "out") == uninterrupted()


def test_an_interrupted_run_is_no_model(half_done):
    out, _ = half_done
    for command in (["verify", out], ["eval", out, "--tasks", "wikitext2"], ["plan", out, "--ratio", 0.3]):
        result = run_lrc(*command)
        assert result.code != 0
        assert f"{out} holds an interrupted run" in result.err


# ---- another request, another process, another's files


def test_a_changed_request_is_refused_with_every_difference(half_done, request_for, model, tmp_path, uninterrupted):
    out, _ = half_done
    (out / ".lrc.lock").unlink()
    before = untouched(out)
    other_text = tmp_path / "other.txt"
    other_text.write_text(tiny_text(20_000, seed=1))
    result = run_lrc(
        *request_for(model, out, "--seed", 7, "--set", "keep=['*.v_proj']", "--dtype", "bfloat16", text=other_text)
    )
    assert result.code == 2
    for difference in (
        "recipe.calibration.seed: it has 0, you asked for 7",
        'recipe.keep: it has [], you asked for ["*.v_proj"]',
        'dtype: it has "float32", you asked for "bfloat16"',
        "recipe.calibration.tokens: it has",
        "other.txt",
        "--restart",
    ):
        assert difference in result.err
    assert "recipe.ratio" not in result.err  # it is as it was
    assert untouched(out) == before
    lrc_ok(*request_for(model, out, "--restart"))
    assert contents(out) == uninterrupted()


def test_a_changed_model_is_refused(half_done, request_for, damaged, tiny_checkpoints):
    out, _ = half_done
    other = tiny_checkpoints("llama", num_hidden_layers=2, seed=5)
    result = run_lrc(*request_for(other, out))
    assert result.code == 2
    assert "model.fingerprint: it has" in result.err
    config = json.loads((damaged / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (damaged / "config.json").write_text(json.dumps(config))
    result = run_lrc(*request_for(damaged, out))
    assert result.code == 2
    assert "model.config: it has" in result.err
    assert "fingerprint" not in result.err


def test_the_same_model_elsewhere_continues(half_done, request_for, damaged):
    out, _ = half_done
    assert "finished earlier, replayed" in lrc_ok(*request_for(damaged, out))


def test_a_finished_result_is_left_alone(model, request_for, uninterrupted, tmp_path):
    out = tmp_path / "out"
    lrc_ok(*request_for(model, out))
    before = untouched(out), out.stat().st_mtime_ns
    assert "nothing to do" in lrc_ok(*request_for(model, out))
    assert (untouched(out), out.stat().st_mtime_ns) == before
    result = run_lrc(*request_for(model, out, "--ratio", 0.5))
    assert result.code == 2
    assert "recipe.ratio: it has 0.3, you asked for 0.5" in result.err
    assert (untouched(out), out.stat().st_mtime_ns) == before
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert str(shard) in result.err and "--restart" in result.err
    (out / "notes.txt").write_text("mine")
    lrc_ok(*request_for(model, out, "--restart"))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert contents(out) == uninterrupted()


def test_two_at_once_on_one_folder(model, request_for, tmp_path):
    out = tmp_path / "out"
    with Artifact(out, {"recipe": "another run"}):
        result = run_lrc(*request_for(model, out, "--restart"))
        assert result.code == 2
        assert f"Another lrc is writing to {out}" in result.err
        assert (out / JOURNAL).exists()


def test_statistics_in_another_process_are_not_taken_from_it_and_a_killed_one_holds_up_nobody(model, request_for, tmp_path):
    folder = tmp_path / "statistics"
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with StatsStore(folder, {"of": "another model"}, {}).alone():
                os.write(started, b"!")
                time.sleep(60)
        finally:
            os._exit(70)
    try:
        os.close(started)
        assert os.read(ready, 1) == b"!"  # nothing to read: the child has failed
        before = untouched(folder)
        result = run_lrc(*request_for(model, tmp_path / "out", "--statistics", folder))
        assert result.code == 2
        assert f"Another lrc works with the statistics in {folder}" in result.err
        assert untouched(folder) == before
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    lrc_ok(*request_for(model, tmp_path / "out", "--statistics", folder))


def test_two_processes_that_write_one_file_at_one_moment_each_put_it_down_whole(tmp_path):
    path = tmp_path / "losses.json"
    with replacing(path) as temporary:
        temporary.write_text("of this ")
        child = os.fork()
        if child == 0:
            try:
                write_json(path, {"of": "the other"})
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert read_json(path, dict[str, str]) == {"of": "the other"}
        with temporary.open("a") as file:
            file.write("process")
    assert path.read_text() == "of this process"
    assert [each.name for each in tmp_path.iterdir()] == ["losses.json"]


@pytest.mark.parametrize("more", [[], ["--restart"]])
def test_files_of_others_are_neither_mixed_nor_deleted(more, model, request_for, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    result = run_lrc(*request_for(model, out, *more))
    assert result.code == 2
    assert "thesis.tex" in result.err
    assert contents(out).keys() == {"thesis.tex"}


@pytest.mark.parametrize("more", [[], ["--restart"]])
def test_the_model_is_never_overwritten_by_its_result(more, damaged, request_for):
    for path in damaged.iterdir():  # what is left could pass for lrc's own files by name
        if path.name not in ("config.json", INDEX) and path.suffix != ".safetensors":
            path.unlink()
    before = contents(damaged)
    result = run_lrc(*request_for(damaged, damaged, *more))
    assert result.code == 2
    assert "holds other files" in result.err
    assert contents(damaged) == before
