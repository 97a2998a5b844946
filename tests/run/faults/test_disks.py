"""Disks that are full, read-only or in the way: through the real command on tiny models."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import contents, lrc_ok, run_lrc
from safetensors import SafetensorError
from safetensors.torch import save_file

import lrc.checkpoint.artifact
from lrc.checkpoint.folder import JOURNAL
from lrc.commands.common.terminal import Progress


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama", num_hidden_layers=2)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts, or mounts anew, a memory disk with options such as 'size=300k'."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        wanted = f"remount,{options}" if mounted else options
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", wanted, "tmpfs", folder], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command to make a small disk with")
        if done.returncode:
            pytest.skip(f"no permission to mount a small disk: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


def test_too_small_a_disk_is_refused_before_any_work(small_disk, model, request_for):
    out = small_disk("size=64k") / "out"
    result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert "free; the result needs 0.4 MB" in result.err
    assert "layer" not in result.err
    assert not (out / "config.json").exists()


def test_a_disk_that_fills_up_under_way(small_disk, model, request_for, uninterrupted, monkeypatch):
    disk = small_disk("size=600k")
    out, ballast = disk / "out", disk / "ballast"
    printed = Progress._layer

    def fill(self, report) -> None:
        printed(self, report)
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 1000):
                    pass
            except OSError:
                return

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "_layer", fill)
        result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert f"Cannot write {out / 'lrc.part-00002-of-00003.safetensors'}" in result.err
    assert "Free some space and run the same command again" in result.err
    assert set(contents(out)) == {JOURNAL, "lrc.part-00001-of-00003.safetensors"}
    ballast.unlink()
    assert "finished earlier, replayed" in lrc_ok(*request_for(model, out))
    assert contents(out) == uninterrupted()


def test_a_disk_that_fills_up_at_the_very_end(small_disk, model, request_for, uninterrupted):
    shards = sum(path.stat().st_size for path in model.glob("*.safetensors")) * 0.78
    out = small_disk(f"size={int(shards) // 4096 * 4 + 8}k") / "out"
    result = run_lrc(*request_for(model, out))
    assert result.code == 1
    assert "Free some space" in result.err
    assert not (out / "config.json").exists()
    small_disk("size=2m")
    lrc_ok(*request_for(model, out))
    assert contents(out) == uninterrupted()


@pytest.mark.parametrize(
    "refusal",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_no_space_however_it_is_reported(refusal, model, request_for, uninterrupted, tmp_path, monkeypatch):
    real, calls = save_file, []

    def full(*args: object, **kwargs: object) -> None:
        calls.append(1)
        real(*args, **kwargs)
        if len(calls) == 2:
            raise refusal

    with monkeypatch.context() as patched:
        patched.setattr(lrc.checkpoint.artifact, "save_file", full)
        result = run_lrc(*request_for(model, tmp_path / "out"))
    assert result.code == 1
    assert "lrc.part-00002-of-00003.safetensors" in result.err and "Free some space" in result.err
    assert set(contents(tmp_path / "out")) == {JOURNAL, "lrc.part-00001-of-00003.safetensors"}
    lrc_ok(*request_for(model, tmp_path / "out"))
    assert contents(tmp_path / "out") == uninterrupted()


def test_a_read_only_disk(small_disk, model, request_for):
    out = small_disk("size=600k") / "out"
    small_disk("ro")
    result = run_lrc(*request_for(model, out))
    assert result.code == 2
    assert f"Cannot write {out}" in result.err and "may write to" in result.err
    assert "layer" not in result.err


def test_a_folder_without_permission(model, request_for, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; test_a_read_only_disk covers it there")
    (tmp_path / "locked").mkdir(mode=0o555)
    result = run_lrc(*request_for(model, tmp_path / "locked" / "out"))
    assert result.code == 2
    assert "may write to" in result.err


@pytest.mark.parametrize("place", ["file", "file/out", "file/deep/out"])
def test_a_file_in_the_way_of_the_folder(place, model, request_for, tmp_path):
    (tmp_path / "file").write_text("a file")
    result = run_lrc(*request_for(model, tmp_path / place))
    assert result.code == 2
    assert f"Cannot write {tmp_path / place}" in result.err and "Give a folder" in result.err
    assert (tmp_path / "file").read_text() == "a file"
