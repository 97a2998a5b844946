"""Advice on recipes for a size: plans from headers, then a trial of each recipe on a few layers of the model itself.

What is cheap and true:

* A plan says exactly which recipes reach the size, and with how many bytes.
* A trial runs the recipe as it is, allocation and all, on a sample of layers (evenly spread; every other layer stays dense),
  with little calibration text, and writes a checkpoint. Recipes that drop layers, or that solve several layers together, run on
  the whole model.
* The divergence KL(original ‖ trial), in nats per token over windows that no statistic saw, is measured for each on the same
  tokens. It is multiplied by (bytes that the plan removes) / (bytes that the trial removed), as if losses of layers added up.

What it does not know: losses of layers do not quite add up, and large ones compound; the first and the last layer, which often
matter more, may be outside the sample; a run takes more calibration text than a trial, and loses less with it; text of another
kind loses more. The order of the recipes is what a trial is for; its numbers are rough.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...calibrate.data import NO_TEXT, Calibration, CalibrationSpec
from ...checkpoint.atomic import discard, require_space
from ...checkpoint.hf_quantizer import install_stored
from ...checkpoint.location import Location
from ...errors import BudgetError, NonFiniteError
from ...model.events import Event, Notify, silent
from ...model.view import ModelView
from ...plan.plan import Draft
from ...plan.planner import make_draft
from ..pipeline import carry_out, shared_statistics
from .candidates import CODES, NUMBERS, PLAIN, Candidate, sampled_layers, trial_recipe
from .measure import Measured, last_states, measured

HOPELESS = 3.0  # nats per token; predictions have nothing to do with the original's any more
CLOSE = 1.25  # predicted losses within this factor are not told apart


@dataclass(frozen=True)
class Trial:
    """What was tried of one candidate.

    Args:
        candidate: the recipe with its plan.
        measured: of the trial.
        layers: how many layers were compressed; all of them where the recipe cannot be tried on some.
        factor: bytes that the plan removes over those that the trial removed.
        seconds: that the trial took.
    """

    candidate: Candidate
    measured: Measured
    layers: int
    factor: float
    seconds: float

    @property
    def predicted(self) -> float:
        """KL(original ‖ result) in nats per token."""
        return self.measured.divergence * self.factor

    @property
    def times(self) -> float:
        """By what perplexity would be multiplied if cross-entropy rose as much; infinite past any meaning."""
        return math.exp(self.predicted) if self.predicted < 20 else math.inf


@dataclass(frozen=True)
class Pick:
    """A recipe that is named, and why."""

    trial: Trial
    why: str


def picks(trials: Sequence[Trial]) -> list[Pick]:
    """Two or three recipes: the least loss, and the least of each other kind of result; a hopeless one only if all are.

    Args:
        trials: ascending in predicted loss.
    """
    if not trials:
        return []
    first = trials[0]
    reasons = {
        CODES: "the least loss with codes, which are decoded at run time",
        NUMBERS: "the least loss without codes: factors and fewer channels, in the checkpoint's own dtype",
        PLAIN: "the least loss among plain checkpoints, which open without lrc",
    }
    found = [Pick(first, f"the least predicted loss ({first.candidate.kind})")]
    for kind in (CODES, NUMBERS, PLAIN):
        best = next((trial for trial in trials if trial.candidate.kind == kind), None)
        if best is not None and best is not first and best.predicted < HOPELESS:
            found.append(Pick(best, reasons[kind]))
    if len(found) == 1 and len(trials) > 1 and trials[1].predicted < HOPELESS:
        found.append(Pick(trials[1], "the next one"))
    return found[:3]


def tried(
    view: ModelView,
    candidates: Sequence[Candidate],
    calibration: Calibration,
    spec: CalibrationSpec,
    layers: int,
    devices: Sequence[torch.device],
    notify: Notify = silent,
) -> tuple[list[Trial], dict[str, str]]:
    """Try each candidate on some layers, in a temporary folder that is deleted at the end.

    Args:
        calibration: with held-out windows, on which the divergence is measured.
        spec: by which it was read.
        layers: how many are compressed.

    Returns:
        The trials, ascending in predicted loss; for each recipe that could not be tried, why.

    Raises:
        OutputError: TMPDIR has no room for a trial.
        LrcError: the model cannot be read.
    """
    chosen, fresh = sampled_layers(view, layers), _fresh(view)
    drafts: list[tuple[Candidate, Draft]] = []
    found, failed = [], {}
    for candidate in candidates:
        try:
            drafts.append((candidate, make_draft(fresh, trial_recipe(candidate, fresh, chosen, spec), devices)))
        except BudgetError as error:
            failed[candidate.name] = error.what
    room = max((draft.disk_bytes for _, draft in drafts), default=0)
    require_space(Path(tempfile.gettempdir()), room, "a trial needs", "name a folder on another disk in TMPDIR")
    with tempfile.TemporaryDirectory(prefix="lrc-advise-") as place:
        work = _Trying(view, calibration, devices, Path(place), len(chosen))
        work.prepare([draft for _, draft in drafts], notify)
        for number, (candidate, draft) in enumerate(drafts, 1):
            notify(Event(f"trying {candidate.name}", number - 1, len(drafts)))
            try:
                trial = work.trial(candidate, draft)
            except (BudgetError, NonFiniteError) as error:
                failed[candidate.name] = error.what
                continue
            found.append(trial)
            notify(Event(f"{candidate.name}: {trial.predicted:.3g} nats", number, len(drafts), trial.seconds))
    return sorted(found, key=lambda trial: trial.predicted), failed


class _Trying:
    """Trials in one folder: statistics of the original and its predictions are shared."""

    def __init__(
        self, view: ModelView, calibration: Calibration, devices: Sequence[torch.device], folder: Path, layers: int
    ) -> None:
        self._view, self._calibration, self._devices = view, calibration, devices
        self._folder, self._layers = folder, layers
        self._original: list[torch.Tensor] = []

    def prepare(self, drafts: Sequence[Draft], notify: Notify) -> None:
        """Measure what all trials share."""
        started = time.perf_counter()
        self._original = last_states(self._view.widened(), self._calibration.held_out, self._devices)
        one_shot = [draft for draft in drafts if _one_shot(draft)]
        if one_shot:
            shared_statistics(one_shot, _fresh(self._view), self._calibration, self._shared, self._devices)
        notify(Event("statistics for all trials", seconds=time.perf_counter() - started))

    @property
    def _shared(self) -> Path:
        return self._folder / "statistics"

    def trial(self, candidate: Candidate, draft: Draft) -> Trial:
        """Compress by a trial's draft, measure, and delete the result."""
        started, out, view = time.perf_counter(), self._folder / "trial", _fresh(self._view)
        seen = self._calibration if draft.recipe.reads_text else NO_TEXT
        try:
            done = carry_out(draft, view, seen, out, devices=self._devices, shared=self._shared if _one_shot(draft) else None)
            wide = view.widened().dtype  # rounding in 16 bits changes predictions too, and would be taken for a loss
            small = ModelView(Location(str(out), out), wide, view.trust_remote_code, prepare=install_stored)
            result = measured(small, self._calibration.held_out, self._original, self._devices)
        finally:
            discard(out)
        plan, removed = candidate.draft, done.bytes_before - done.bytes_after
        factor = (plan.whole_bytes - plan.whole_after) / removed if candidate.sampled and removed > 0 else 1.0
        layers = self._layers if candidate.sampled else plan.layers
        return Trial(candidate, result, layers, factor, time.perf_counter() - started)


def _one_shot(draft: Draft) -> bool:
    """Whether a recipe starts from statistics of the original model, which others can share."""
    recipe = draft.recipe
    return recipe.reads_text and recipe.depth is None and recipe.propagate == "original"


def _fresh(view: ModelView) -> ModelView:
    """A new view: a run replaces modules of its own."""
    return ModelView(view.location, view.dtype, view.trust_remote_code)
