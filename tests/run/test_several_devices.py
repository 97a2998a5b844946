"""Units solved on several devices: the same bytes as on one, from the same statistics, and what the plan says of memory."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from commandline import contents

from lrc.checkpoint.location import locate
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.machine import room
from lrc.plan.memory import predict_memory
from lrc.plan.planner import make_draft
from lrc.run import solve
from lrc.run.losses import curves
from lrc.run.pipeline import run_request
from lrc.run.request import Request

CPU, GPUS = torch.device("cpu"), (torch.device("cuda:0"), torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("family", "recipe", "settings"),
    [
        ("llama", "svd-llm", {}),
        ("llama", "lrc-fast", {}),  # losses by probes; units of several targets
        ("mixtral", "svd-llm", {"allocation": "kl"}),  # experts
        ("llama", "lrc-gradient", {}),
        ("llama", "basis-sharing", {}),  # units of several layers
        ("llama", "svd-llm", {"allocation": "effective-rank"}),  # a rule that reads the solution
        ("llama", "trellis", {"settings.bits": 2, "propagate": "original"}),
    ],
)
def test_two_devices_give_the_bytes_of_one(family, recipe, settings, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    asked = {"calibration.source": f"text:{tiny_text_file}", "calibration.samples": 8, "calibration.length": 48}
    if "settings.bits" not in settings:
        asked["ratio"] = 0.3
    request = Request(locate(str(tiny_checkpoints(family))), load_recipe(recipe, asked | settings), (CPU,), None)
    run_request(request, tmp_path / "one", statistics=tmp_path / "statistics")
    for measured in [*(tmp_path / "statistics").rglob("nats-*"), *(tmp_path / "statistics").rglob("*.curves-*")]:
        measured.unlink()  # the losses, too, are made anew
    threads: set[str] = set()
    real = solve.solve_unit

    def seen(*arguments):
        threads.add(threading.current_thread().name)
        return real(*arguments)

    monkeypatch.setattr(solve, "solve_unit", seen)
    monkeypatch.setattr(curves, "solve_unit", seen)
    run_request(replace(request, devices=(CPU, CPU)), tmp_path / "two", statistics=tmp_path / "statistics")
    assert threads - {"MainThread"}
    same, other = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert same.keys() == other.keys()
    assert {name for name in same if same[name] != other[name] and name.endswith(".safetensors")} == set()


def test_a_plan_for_gpus_says_what_each_holds_and_takes_it_from_main_memory(tiny_checkpoints):
    wide = {"hidden_size": 256, "intermediate_size": 512}
    view = ModelView(locate(str(tiny_checkpoints("llama", **wide))))
    recipe = load_recipe("lrc-fast", {"ratio": 0.3, "calibration.samples": 8, "calibration.length": 48})
    draft = make_draft(view, recipe)
    assert draft.memory.on_gpu == {} and draft.memory.gpu_peak == 0
    memory = predict_memory(view, draft, GPUS)
    assert {"forward", "solve", "probes"} <= set(memory.on_gpu) and "embedding" not in memory.on_gpu
    assert memory.gpu_peak == max(memory.on_gpu.values())
    for moment in ("forward", "solve"):  # what is on the GPU is not in main memory
        assert memory.moments[moment] < draft.memory.moments[moment]
        assert memory.moments[moment] + memory.on_gpu[moment] >= draft.memory.moments[moment]
    assert predict_memory(view, draft, GPUS[:1]).on_gpu == memory.on_gpu  # each holds a layer of its own
    two = predict_memory(view, draft, (CPU, CPU))
    assert two.moments["solve"] > draft.memory.moments["solve"]  # two units at once


def test_a_gpu_with_too_little_free_memory_is_refused_by_name(tiny_checkpoints, tmp_path, monkeypatch):
    view = ModelView(locate(str(tiny_checkpoints("llama"))))
    draft = make_draft(view, load_recipe("svd-llm", {"ratio": 0.3, "calibration.samples": 8, "calibration.length": 48}))
    planned = replace(draft, memory=predict_memory(view, draft, GPUS))
    free = {GPUS[0]: 10**9, GPUS[1]: 1000}
    monkeypatch.setattr(room, "free_memory", free.get)
    room.require_room(planned, tmp_path / "out", devices=GPUS[:1])
    with pytest.raises(room.ResourceError, match=r"of the memory of cuda:1 \(most at the moment '.*'\), and 1\.0 kB are free"):
        room.require_room(planned, tmp_path / "out", devices=GPUS)
