"""Depth's part of a run: what goes is chosen, repaired and kept on disk, once, before anything is compressed or stored."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..calibrate.data import Calibration
from ..checkpoint.artifact import Artifact
from ..checkpoint.atomic import writing
from ..depth.choose import choose_removed
from ..depth.model_edit import ModelEdit, read_model_edit
from ..depth.repair import repaired
from ..model.host_memory import steady_memory
from ..model.precision import full_precision
from ..model.view import ModelView
from ..plan.plan import Plan
from ..refine.trainer import Windows


@full_precision
def operated(
    plan: Plan,
    view: ModelView,
    calibration: Calibration,
    out: Path,
    folder: Path,
    trials: Path,
    devices: Sequence[torch.device],
    restart: bool,
    notify: Callable[[str, int, float], None],
) -> ModelEdit | None:
    """What depth does to the model, found or read from where an interrupted run found it; None where all is finished.

    Args:
        plan: provisional: of a recipe with depth.
        out: the output folder.
        folder: keeps what was found until the artifact is finished.
        trials: a folder that keeps what a greedy score measured, which other recipes may share.
        notify: called with (what was done, 0, seconds).
    """
    identity = plan.identity(calibration.hash)
    steady_memory()
    with Artifact(out, identity, restart) as artifact:
        if artifact.finished:
            return None
        if restart:
            shutil.rmtree(folder, ignore_errors=True)
        held = read_model_edit(folder, identity, view.targets)
        if held is not None:
            return held
        spec = plan.recipe.dropping
        assert spec is not None
        chosen = choose_removed(view, spec, calibration.tokens, devices, trials, notify)
        windows = Windows(calibration.tokens, calibration.held_out)
        found = repaired(view, chosen, spec, windows, plan.recipe.calibration.seed, devices[0], notify)
        with writing(folder):
            return found.write(folder, identity)
