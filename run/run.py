"""The context of a run: one immutable value that every step receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibrate.data import Calibration
from ..checkpoint.artifact import Artifact
from ..checkpoint.folder import SCRATCH
from ..model.events import Event, Notify, silent
from ..model.view import ModelView
from ..plan.plan import Planned

STATISTICS, SEARCHED = SCRATCH  # folders in the output folder, of statistics and of a search's trials; deleted at the end
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """The context of one run.

    Args:
        view: the model; its weights are loaded and unloaded during the run.
        calibration: the calibration set: tokens (samples, length), and held-out tokens.
        artifact: the open output folder; finished shards in it are not computed again.
        devices: the devices on which layers run. The batches of a layer are spread over them; targets are solved on the first.
        shared: a folder for statistics that other recipes can use too; None: statistics are in the output folder, and are
            deleted when the artifact is finished.
        notify: receives an `Event` after each finished step.
    """

    view: ModelView
    calibration: Calibration
    artifact: Artifact
    devices: Sequence[torch.device] = (CPU,)
    shared: Path | None = None
    notify: Notify = silent

    @property
    def own_folder(self) -> Path:
        """Folder for statistics that only this run uses; it is deleted when the artifact is finished."""
        return self.artifact.folder / STATISTICS

    @property
    def statistics_folder(self) -> Path:
        """Folder for statistics that other recipes can use too."""
        return self.shared or self.own_folder


@dataclass(frozen=True, kw_only=True)
class PlanMade(Event):
    """A draft was made, or the plan was made from measurements."""

    plan: Planned


@dataclass(frozen=True, kw_only=True)
class TextRead(Event):
    """The calibration text was read and tokenised."""

    calibration: Calibration
