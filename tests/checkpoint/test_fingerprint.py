"""A checkpoint's fingerprint: every byte counts, and a file that has not changed is read once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from commandline import lrc_ok

import lrc.checkpoint.reading.fingerprint as module
from lrc.checkpoint.reading.fingerprint import fingerprint, unread_bytes
from lrc.errors import CheckpointError

SIZE = 5 << 20


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A file of 5 MiB, beside an empty cache; it counts as old enough to be remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_known", {})
    monkeypatch.setattr(module, "_SETTLED", -60.0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def forget(monkeypatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(module, "_known", {})


def no_reading(monkeypatch) -> None:
    monkeypatch.setattr(module, "sha256_of", lambda path: pytest.fail(f"{path} was read"))


@pytest.mark.parametrize("when", [0, 10**9, 3 * 10**9])  # 1970, 2001, 2065
def test_one_bit_anywhere_is_another_checkpoint_whatever_its_times_say(when, file):
    """Also where size and time are as before, as after `touch -r`, and whatever the clock says."""
    os.utime(file, (when, when))
    seen = {fingerprint([file])}
    for place in range(0, SIZE, SIZE // 8 + 1):
        with file.open("r+b") as held:
            held.seek(place)
            byte = held.read(1)[0]
            held.seek(place)
            held.write(bytes([byte ^ 4]))
        os.utime(file, (when, when))
        seen.add(fingerprint([file]))
    assert len(seen) == 9


def test_a_file_is_read_once_by_all_processes_and_again_where_it_was_written(file, monkeypatch):
    told = []
    first = fingerprint([file], lambda done, files: told.append((done, files)))
    assert told == [(1, 1)] and unread_bytes([file]) == 0
    forget(monkeypatch)
    with monkeypatch.context() as patched:
        no_reading(patched)
        assert fingerprint([file]) == first
    assert unread_bytes([file]) == 0
    file.write_bytes(file.read_bytes())
    assert unread_bytes([file]) == SIZE
    assert fingerprint([file]) == first


def test_a_file_that_was_written_this_moment_is_not_remembered(file, monkeypatch):
    """It could be written again within one tick of the file system's clock."""
    monkeypatch.setattr(module, "_SETTLED", 2.0)
    fingerprint([file])
    assert unread_bytes([file]) == SIZE


@pytest.mark.parametrize("harm", ["damaged", "a bit flipped", "a folder", "not writable"])
def test_a_cache_that_is_no_use_means_reading_again(harm, file, monkeypatch):
    first = fingerprint([file])
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "lrc" / "fingerprints.json"
    held = cache.read_bytes()
    if harm == "a bit flipped":
        place = held.index(hashlib.sha256(file.read_bytes()).hexdigest().encode())
        cache.write_bytes(held[:place] + (b"1" if held[place : place + 1] != b"1" else b"2") + held[place + 1 :])
    elif harm == "damaged":
        cache.write_bytes(held[: len(held) // 2])
    else:
        cache.unlink()
        if harm == "a folder":
            cache.mkdir()
        else:
            cache.parent.rmdir()
            cache.parent.write_text("in the way")
    forget(monkeypatch)
    assert unread_bytes([file]) == SIZE
    assert fingerprint([file]) == first


def test_without_a_home_folder(file, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home folder")))
    assert fingerprint([file]) == fingerprint([file])


def test_a_file_that_changes_while_it_is_read_is_refused(file, monkeypatch):
    real = module.sha256_of

    def read(path: Path) -> str:
        found = real(path)
        path.write_bytes(b"other")
        return found

    monkeypatch.setattr(module, "sha256_of", read)
    with pytest.raises(CheckpointError, match="changes while it is read"):
        fingerprint([file])


def test_a_file_of_the_hubs_cache_that_does_not_hash_to_its_name_is_damaged(file, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob = file.rename(blobs / hashlib.sha256(file.read_bytes()).hexdigest())
    link = snapshot / "model.safetensors"
    link.symlink_to(blob)
    fingerprint([link])
    with link.open("r+b") as held:  # as a program that saves to the snapshot: through the link
        held.write(b"x")
    with pytest.raises(CheckpointError, match="changed or damaged after its download"):
        fingerprint([link])


def test_a_plan_reads_no_weights_and_says_what_a_run_would_read(tiny_checkpoints, request_for, tmp_path, monkeypatch):
    model = tiny_checkpoints("llama", num_hidden_layers=2, seed=11)
    monkeypatch.setattr(module, "_SETTLED", -60.0)
    plan = ["plan", *request_for(model, tmp_path / "out")[1:]]
    plan = [*plan[:2], *plan[4:]]  # without --out
    with monkeypatch.context() as patched:
        no_reading(patched)
        said = lrc_ok(*plan)
    size = sum(path.stat().st_size for path in model.glob("model*"))
    assert f"checkpoint: {size / 1000:.1f} kB to read once" in said
    assert "checkpoint's hash" in lrc_ok(*request_for(model, tmp_path / "out"))
    assert "checkpoint: its hash is known" in lrc_ok(*plan)
