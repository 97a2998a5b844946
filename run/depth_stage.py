"""The depth stage of a run: it prunes layers or sub-layers and repairs the model, once, before any matrix is compressed."""

from __future__ import annotations

from ..calibrate.store import TRIALS
from ..checkpoint.atomic import writing
from ..depth.choose import choose_removed
from ..depth.model_edit import ModelEdit, read_model_edit
from ..depth.repair import repaired
from ..plan.plan import Draft
from ..refine.trainer import Windows
from .run import Run


def model_edit_of(draft: Draft, run: Run) -> ModelEdit:
    """The model edit of a recipe with depth: computed here, or read from disk if an interrupted run has computed it.

    The model edit is kept in the run's own folder until the artifact is finished. The ablations of a greedy score are kept in
    the folder of statistics, where other recipes can use them too.

    Args:
        draft: the draft of a recipe with depth.
        run: the run.
    """
    view, calibration, identity = run.view, run.calibration, run.artifact.identity
    held = read_model_edit(run.own_folder, identity, view.targets)
    if held is not None:
        return held
    spec = draft.recipe.dropping
    assert spec is not None

    chosen = choose_removed(view, spec, calibration.tokens, run.devices, run.statistics_folder / TRIALS, run.notify)
    seed = draft.recipe.calibration.seed
    windows = Windows(calibration.tokens, calibration.held_out)
    found = repaired(view, chosen, spec, windows, seed, run.devices[0], run.notify)
    with writing(run.own_folder):
        return found.write(run.own_folder, identity)
