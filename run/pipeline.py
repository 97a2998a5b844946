"""The pipeline: it takes a model and a recipe and writes a finished artifact.

`compress` is the function behind `lrc compress` and `lrc.compress(...)`; read this file from there. `carry_out` is its second
part: it takes a draft and the calibration set and writes the artifact. The trials of a search call it too. No function here
depends on which method runs. Work that an earlier, killed run finished is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..calibrate.collect import Statistics, backward_needs, collect, collect_backward
from ..calibrate.data import NO_TEXT, Calibration, load_calibration
from ..calibrate.generate import generator
from ..calibrate.gradients import GradientSettings, backward_passes
from ..checkpoint.artifact import Artifact
from ..checkpoint.folder import is_begun
from ..compress.base import FORWARD_NEEDS
from ..export.plain import as_plain
from ..model.events import Event, Noted, Notify, silent
from ..model.machine.host_memory import steady_memory
from ..model.machine.precision import full_precision
from ..model.view import ModelView, require_positions
from ..plan.machine.room import require_room
from ..plan.plan import Draft, Plan, Planned
from ..plan.planner import make_draft, make_plan
from ..refine.end_to_end import Distillation, refine_artifact
from ..refine.trainer import Windows
from .depth_stage import model_edit_of
from .duration.foretell import Foretold, foretell
from .layer_loop import compress_layers
from .losses.curves import measure
from .output import config_of, finish, part_names, write_outside
from .request import Request, require_possible
from .result import Result
from .run import CPU, PlanMade, Run, TextRead
from .search import search

_HASHING = 10.0  # seconds between two events while the checkpoint is hashed
DISTILLATION = "distillation"  # a folder inside the folder of statistics


def compress(
    model: str | Path,
    recipe: str | Path = "lrc-fast",
    *,
    out: str | Path,
    statistics: str | Path | None = None,
    restart: bool = False,
    notify: Notify = silent,
    **settings: Any,
) -> Result:
    """Compress a model into a folder. The same call continues an interrupted run.

    Args:
        model: a hub id, a folder with safetensors, a `.gguf` file, or `pkg:PACKAGE/FILE`.
        recipe: the name of a shipped recipe, or a YAML file.
        out: the folder for the result; it must be new, empty, or hold a run of the same request.
        statistics: a folder for the original model's statistics, which other recipes can use too; None: they are deleted when
            the result is finished.
        restart: delete an earlier run in `out` and start over.
        notify: receives an `Event` after each finished step.
        **settings: keys of the recipe, such as `ratio=0.4`, `keep=["*.v_proj"]` or `calibration={"source": "text:FILE"}`, and
            `device` ("cpu", "cuda:0,cuda:1", "auto"), `dtype` ("bfloat16", "float32", "float16"), `trust_remote_code`,
            `max_shard_size` ("5GB").

    Returns:
        The finished artifact in `out`: sizes, ratios, the record of each target, and the measurements.

    Raises:
        LrcError: a problem that the user can fix; finished work is kept, and the same call continues the run.
    """
    request = Request.of(model, recipe, **settings)
    require_possible(request.recipe, request.location)
    return run_request(request, Path(out), None if statistics is None else Path(statistics), restart, notify)


def plan(model: str | Path, recipe: str | Path = "lrc-fast", **settings: Any) -> Draft:
    """Plan a compression from the recipe and the headers of the weight files.

    Reads no weights, except scales of fp8 weights, tied weights that are in the files twice, and those of one layer of each
    kind if the recipe prunes sub-layers.

    Args:
        model, recipe, **settings: as for `compress`.

    Returns:
        The draft of the plan; it does not yet depend on any measurement.

    Raises:
        LrcError: a problem that the user can fix.
    """
    request = Request.of(model, recipe, **settings)
    draft = make_draft(request.view(), request.recipe, request.devices)
    return replace(draft, max_shard_bytes=request.max_shard_bytes)


def run_request(
    request: Request,
    out: Path,
    statistics: Path | None = None,
    restart: bool = False,
    notify: Notify = silent,
    timed: bool = False,
    checked: bool = False,
) -> Result:
    """Carry out a checked request; the arguments, the result and the errors are those of `compress`.

    Args:
        timed: predict first how long the run will take, unless an earlier run of the folder is continued; see `Foretold`.
        checked: whether the caller measures a quick perplexity of the result, which takes time too.
    """
    request.require_folder(out)
    view = request.view()
    draft = replace(make_draft(view, request.recipe, request.devices), max_shard_bytes=request.max_shard_bytes)
    notify(PlanMade("plan", plan=draft))
    require_text_fits(view, draft)
    require_room(draft, out, statistics, request.devices)
    if timed and (restart or not is_begun(out)):
        notify(Foretold("time", duration=foretell(request.view(), draft, out, request.devices, checked=checked)))
    calibration = text_for(draft, view, request.devices[0])
    notify(TextRead("calibration text", calibration=calibration))
    return carry_out(draft, view, calibration, out, devices=request.devices, shared=statistics, restart=restart, notify=notify)


def require_text_fits(view: ModelView, draft: Planned) -> None:
    """Raise CalibrationError if the calibration samples are longer than the model's context."""
    if draft.recipe.reads_text:
        require_positions(view.config, draft.recipe.calibration.length, "calibration.length")


def text_for(draft: Planned, view: ModelView, device: torch.device) -> Calibration:
    """The tokenised calibration set of a recipe; `NO_TEXT` if the recipe needs none.

    Args:
        device: the device on which the model generates text (`calibration.source: self`).
    """
    if not draft.recipe.reads_text:
        return NO_TEXT
    trusted = view.trust_remote_code
    writer = generator(view.location.name, view.dtype, device, trusted)
    return load_calibration(draft.recipe.calibration, view.location.tokenizer(trusted), writer)


@full_precision
def carry_out(
    draft: Draft,
    view: ModelView,
    calibration: Calibration,
    out: Path,
    *,
    devices: Sequence[torch.device] = (CPU,),
    shared: Path | None = None,
    restart: bool = False,
    notify: Notify = silent,
) -> Result:
    """Carry out a draft: measure, make the final plan, and write the artifact.

    Args:
        draft: from `make_draft`.
        view: the model; its weights are loaded and unloaded, and some of its modules may be compressed afterwards.
        calibration: from `text_for(draft, ...)`.
        out: the output folder; `Artifact` documents its permitted content.
        devices: the devices on which layers run.
        shared: the argument `statistics` of `compress`.
        restart, notify: as for `compress`.

    Raises:
        LrcError: a problem that the user can fix; finished work is kept, and the same call continues the run.
    """
    steady_memory()
    with Artifact(out, draft.identity(_hashed(view, notify), calibration), restart, _told_as_notes(notify)) as artifact:
        if artifact.finished:
            return Result.read(out)
        run = Run(view, calibration, artifact, tuple(devices), shared, notify)
        if draft.recipe.max_ppl_increase is not None:
            draft = search(draft, run, carry_out)
        final, statistics = settle(draft, run)
        artifact.require_space(final.disk_bytes - sum(part.nbytes for part in artifact.done.values()))
        parts = part_names(final, view)
        compress_layers(final, run, parts, statistics)
        write_outside(final, run, parts)
        config = config_of(final, run)
        refinement = artifact.refinement or _refine_whole(final, run, config)
        artifact.merge(final.max_shard_bytes, refinement)
        finish(final, run, as_plain(config, type(view.config), type(view.model)), refinement)
    return Result.read(out, final)


def settle(draft: Draft, run: Run) -> tuple[Plan, Statistics | None]:
    """Measure whatever the final plan depends on, and make that plan.

    Returns:
        The final plan, and the statistics on disk from which the layers are compressed. The statistics are None if each layer's
        are collected when the layer is compressed.
    """
    recipe = draft.recipe
    if recipe.dropping is not None:
        return _told(run, make_plan(run.view, draft, run.devices, model_edit=model_edit_of(draft, run))), None
    if not draft.collects and (run.shared is None or not recipe.reads_text):
        return draft.settled(), None
    # a shared folder belongs to one calibration set, and this recipe may have none
    folder = run.statistics_folder if recipe.reads_text else run.own_folder
    needs = draft.needs_ahead if run.shared is None else draft.needs  # what is shared is for other recipes, too
    statistics = collect(run.view, run.calibration, needs, folder, run.devices, recipe.gradients, run.notify)
    if recipe.allocation == "uniform":
        return draft.settled(), statistics
    return _told(run, make_plan(run.view, draft, run.devices, curves=measure(draft, run, statistics))), statistics


def _told(run: Run, plan: Plan) -> Plan:
    run.notify(PlanMade("plan", plan=plan))
    return plan


@full_precision
def shared_statistics(
    plans: Sequence[Planned], view: ModelView, calibration: Calibration, folder: Path, devices: Sequence[torch.device]
) -> None:
    """Collect the statistics of the original model that any of these plans needs, so that all runs can share one folder.

    Args:
        plans: all of them for the model `view`.
        calibration: the calibration set of all plans.
        folder: the folder for the statistics; statistics that are in it already are not collected again.
        devices: the devices on which layers run.
    """
    names = dict.fromkeys(name for plan in plans for name in plan.needs)
    needs = {name: frozenset[str]().union(*(plan.needs.get(name, ()) for plan in plans)) & FORWARD_NEEDS for name in names}
    collect(view, calibration, needs, folder, devices, GradientSettings())
    passes = backward_passes((plan.recipe.gradients, backward_needs(plan.needs)) for plan in plans)
    for settings, back in passes.items():
        collect_backward(view, calibration, back, folder, devices, settings)


@torch.no_grad()
def _refine_whole(final: Plan, run: Run, config: dict[str, Any]) -> dict[str, Any] | None:
    """Refine the compressed model end to end if the recipe says so.

    Returns:
        The record of the refinement for lrc.json; None if there was no refinement.
    """
    settings = None if final.recipe.refine is None else final.recipe.refine.end_to_end
    if settings is None:
        return None
    view, calibration = run.view, run.calibration
    original = ModelView(view.location, view.dtype, view.trust_remote_code)  # modules of `view` may be compressed by now
    work = Distillation(run.own_folder / DISTILLATION, settings, Windows(calibration.tokens, calibration.held_out))
    return refine_artifact(run.artifact, config, original, work, run.devices, run.notify)


def _hashed(view: ModelView, notify: Notify) -> dict[str, str]:
    """The identity of the model's checkpoint; files whose hash is not remembered are read, and that is reported."""
    started = told = time.perf_counter()

    def tell(done: int, files: int) -> None:
        nonlocal told
        now = time.perf_counter()
        if done == files or now - told > _HASHING:
            notify(Event("checkpoint's hash", done, files, now - started))
            told = now

    return view.identity(tell)


def _told_as_notes(notify: Notify) -> Callable[[str], None]:
    return lambda text: notify(Noted(text))
