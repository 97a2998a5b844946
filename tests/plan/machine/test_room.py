"""Disk and memory that will not do: refused before a layer is read, with the numbers."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
from commandline import run_lrc
from pipeline import compress

from lrc.plan.machine import room
from lrc.plan.planner import make_draft
from lrc.run.request import Request


def command(model, text, out, recipe="lrc-fast"):
    return ["compress", model, "--recipe", recipe, "--ratio", 0.3, "--calibration", f"text:{text}", "--samples", 8,
            "--length", 48, "--out", out]  # fmt: skip


def test_too_little_memory_is_refused_before_any_work(tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "machine_memory", lambda: 50_000_000)
    refused = run_lrc(*command(tiny_checkpoints("llama"), tiny_text_file, tmp_path / "out"))
    assert refused.code == 1 and "of memory (most at the moment '" in refused.err and "the machine has 50.0 MB" in refused.err
    assert "--samples" in refused.err and not (tmp_path / "out").exists()


def test_a_limit_of_the_control_group_counts(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(room, "_CGROUP", limit)
    without = room.machine_memory()
    limit.write_text("123456789\n")
    assert room.machine_memory() == 123456789
    limit.write_text("max\n")
    assert room.machine_memory() == without


def test_a_disk_that_the_statistics_do_not_fit_on_is_refused(tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    """There is room for the result, and none for the statistics beside it."""
    model = tiny_checkpoints("llama")
    request = Request.of(
        model, "lrc-fast", ratio=0.3, calibration={"source": f"text:{tiny_text_file}", "samples": 8, "length": 48}
    )
    draft = make_draft(request.view(), request.recipe)
    assert draft.scratch["statistics"] > 0 and draft.disk_peak > draft.disk_bytes
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, draft.disk_bytes + 1))
    refused = run_lrc(*command(model, tiny_text_file, tmp_path / "out"))
    assert refused.code == 1 and "the result and the run's own files need" in refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "settings"), [("lrc-fast", {"ratio": 0.3}), ("fwsvd", {"ratio": 0.3, "allocation": "spectrum"})]
)
def test_what_is_predicted_of_the_disk_holds(recipe, settings, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    """The files that a run keeps beside its result, seen when its layers are compressed."""
    seen: dict[str, int] = {}

    def look(final, run, parts, statistics):
        files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        seen["losses"] = sum(path.stat().st_size for path in files if path.suffix == ".json" and "statistics" not in path.name)
        seen["statistics"] = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
        seen["scratch"] = sum(final.scratch.values())
        seen["predicted"] = sum(nbytes for kind, nbytes in final.scratch.items() if kind.startswith("statistics"))
        seen["curves"] = final.scratch["losses"]
        raise KeyboardInterrupt

    monkeypatch.setattr("lrc.run.pipeline.compress_layers", look)
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_checkpoints("llama"), tmp_path / "out", tiny_text_file, recipe, **settings)
    assert 0 <= seen["statistics"] - seen["predicted"] < 20_000, seen  # headers of the files
    assert 0.3 * seen["curves"] < seen["losses"] < 2 * seen["curves"], seen
