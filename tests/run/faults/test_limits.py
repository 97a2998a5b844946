"""Limits of the machine: no more memory, and two processes that want one folder at one moment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import contents, lrc_ok, run_lrc
from faults import run_in_child
from safetensors import SafetensorError

import lrc.checkpoint.reading.weights
from lrc.run import layer_loop


@pytest.fixture(scope="module")
def model(tiny_checkpoints) -> Path:
    return tiny_checkpoints("llama", num_hidden_layers=2)


NO_MEMORY = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:128] data. DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("std::bad_alloc"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize("refusal", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_no_memory_however_it_is_reported_is_one_message(refusal, model, request_for, uninterrupted, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise refusal

    command = request_for(model, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(layer_loop.UnitSolver, "solve", refuse)
        result = run_lrc(*command)
    assert result.code == 1
    assert (
        result.told.startswith("lrc: Memory ran out (") and "lrc plan" in result.err and "the same command again" in result.err
    )
    lrc_ok(*command)
    assert contents(tmp_path / "out") == uninterrupted()


def test_a_file_that_cannot_be_mapped_for_want_of_memory_is_not_called_damaged(model, request_for, tmp_path, monkeypatch):
    real, calls = lrc.checkpoint.reading.weights.safe_open, []

    def full(*arguments: object, **more: object) -> object:
        calls.append(1)
        if len(calls) > 8:
            raise SafetensorError("Error while reading: Cannot allocate memory (os error 12)")
        return real(*arguments, **more)

    monkeypatch.setattr(lrc.checkpoint.reading.weights, "safe_open", full)
    result = run_lrc(*request_for(model, tmp_path / "out"))
    assert result.code == 1 and "Memory ran out" in result.err and "Download" not in result.err


@pytest.mark.slow
@pytest.mark.parametrize("spare", [1, 4, 16, 64])
def test_a_limit_of_the_process(spare, model, request_for, tmp_path):
    """`ulimit -v`, a few MB above what the process has when it begins: it ends well or with the message."""
    script = (
        "import resource, sys, lrc.cli, lrc.run.pipeline, transformers\n"
        "taken = int(next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1]) << 10\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (taken + ({spare} << 20), resource.RLIM_INFINITY))\n"
        "lrc.cli.main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", script, *map(str, request_for(model, tmp_path / "out"))]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode in (0, 1), done.stderr
    assert done.returncode == 0 or "Memory ran out" in done.stderr, done.stderr
    told, _, _ = done.stderr.partition("Exception ignored in atexit")  # of other libraries, which have no memory either
    assert "Traceback" not in told
    lrc_ok(*request_for(model, tmp_path / "out"))


def test_a_disk_that_is_full_where_nothing_expects_it(model, request_for, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "/tmp/somewhere")

    monkeypatch.setattr(layer_loop.UnitSolver, "solve", refuse)
    result = run_lrc(*request_for(model, tmp_path / "out"))
    assert result.code == 1 and "Cannot write /tmp/somewhere: No space left on device." in result.err


def at_once(*commands: list[object]) -> list[tuple[int, str]]:
    """(Exit code, stderr) of commands that begin at one moment, each in a process of its own."""
    ready, go = os.pipe()
    children = []
    for command in commands:
        said, told = os.pipe()
        child = os.fork()
        if child == 0:
            run_in_child(told, command, lambda: os.read(ready, 1))
        os.close(told)
        children.append((child, said))
    os.write(go, b"x" * len(commands))
    found = []
    for child, said in children:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with os.fdopen(said, "rb") as pipe:
            found.append((code, pipe.read().decode()))
    os.close(ready)
    os.close(go)
    return found


@pytest.mark.parametrize("shared", ["out", "statistics"])
def test_two_runs_on_one_folder_at_one_moment(shared: str, model, request_for: Callable, tmp_path):
    """One waits for nobody: it is refused and says so, or both finish; the same commands end in the same bytes."""
    fast = ("--recipe", "lrc-fast", "--statistics", tmp_path / "statistics")
    outs = ["one", "one"] if shared == "out" else ["one", "two"]
    commands = [request_for(model, tmp_path / out, *(fast if shared == "statistics" else ())) for out in outs]
    results = at_once(*commands)
    assert any(code == 0 for code, _ in results), results
    for code, said in results:
        assert code == 0 or (code == 2 and "Another lrc" in said), said
    for command in commands:
        lrc_ok(*command)
    first, second = (contents(tmp_path / out) for out in outs)
    shards = [name for name in first if name.endswith(".safetensors")]
    assert shards and all(first[name] == second[name] for name in shards)
    assert not [path for path in (tmp_path / outs[0]).iterdir() if path.name.startswith(".")]
