"""Searching the size: the smallest model whose perplexity on held-out calibration windows rises by at most a given fraction.

A trial runs the recipe at one ratio in a folder inside the output folder, measures the result and deletes it. The search
bisects the ratio, because perplexity increases with the ratio except for noise. The found ratio was measured itself, and the
next larger one on a grid of `STEPS` was too large. Measured perplexities are kept on disk, so that an interrupted search
continues. Trials omit `refine: end-to-end`, which takes longer than everything else. Its gain is additional, and its report
states the amount.

The windows are `calibration.held_out`. They are not part of any statistics, and the search reads no evaluation text.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..checkpoint.atomic import clear_leftovers, discard, read_json, write_json
from ..checkpoint.hf_quantizer import install_stored
from ..checkpoint.location import Location
from ..errors import BudgetError, NonFiniteError
from ..model.events import Event
from ..model.view import ModelView
from ..plan.budget import Found
from ..plan.plan import Draft
from ..plan.planner import make_draft
from ..plan.recipe import Recipe
from .losses.held_out import perplexity
from .run import SEARCHED, PlanMade, Run

STEPS = 128  # ratios are multiples of 1 / STEPS: the found one is less than 1 / STEPS below the largest possible


CarryOut = Callable[..., Any]  # pipeline.carry_out, which runs each trial


def search(draft: Draft, run: Run, carry_out: CarryOut) -> Draft:
    """The draft at the largest ratio whose perplexity stays within the recipe's `max_ppl_increase`.

    Args:
        draft: the draft of a recipe with `max_ppl_increase`.
        run: the run; its calibration set has held-out windows. Trials and their statistics are kept in the output folder until
            the run is finished.
        carry_out: (draft, view, calibration, folder, devices=, shared=) writes the artifact of one trial to the folder.

    Raises:
        BudgetError: even the smallest ratio raises perplexity by more than is allowed.
        LrcError: the errors of `carry_out`.
    """
    allowed, held_out = draft.recipe.max_ppl_increase, run.calibration.held_out
    assert allowed is not None
    work = _Search(draft.recipe, run, carry_out)
    before = work.original()
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if work.at(middle) <= before * (1 + allowed) else (low, middle)
    if low == 0:
        raise BudgetError(
            f"Removing {work.planned(1):.2%} of the targets' bytes, the least that was tried, lets perplexity rise from "
            f"{before:.3f} to {work.at(1):.3f}, and {allowed:.2%} is allowed.",
            "Allow more (max_ppl_increase), or take a recipe that loses less (lrc recipe list).",
        )
    tokens = held_out.numel() - len(held_out)
    found = Found(low / STEPS, before, work.at(low), tokens, work.evaluations)
    sized = make_draft(run.view, draft.recipe, run.devices, found)
    draft = replace(sized, max_shard_bytes=draft.max_shard_bytes)
    run.notify(PlanMade("plan", plan=draft))
    return draft


class _Search:
    """The perplexities that were measured so far; they are kept on disk."""

    def __init__(self, recipe: Recipe, run: Run, carry_out: CarryOut) -> None:
        self._recipe, self._run, self._carry_out = recipe, run, carry_out
        self._folder = run.artifact.folder / SEARCHED
        # of this very request: a folder whose removal was interrupted may hold those of another one
        asked = hashlib.sha256(json.dumps(run.artifact.identity, sort_keys=True).encode()).hexdigest()[:16]
        self._file = self._folder / f"perplexities-{asked}.json"
        clear_leftovers(self._folder)
        self._known: dict[str, float] = read_json(self._file, dict[str, float]) or {}

    @property
    def evaluations(self) -> int:
        """Number of compressed models that were measured."""
        return sum(key != "original" for key in self._known)

    def original(self) -> float:
        """Perplexity of the original on the held-out windows."""
        return self._measured("original", lambda: self._perplexity(self._fresh()))

    def at(self, step: int) -> float:
        """Perplexity at the ratio step / STEPS; infinite if that ratio cannot be met or the result is not finite."""
        return self._measured(str(step), lambda: self._trial(step / STEPS))

    def _measured(self, key: str, measure: Callable[[], float]) -> float:
        if key not in self._known:
            started = time.perf_counter()
            self._known[key] = measure()
            write_json(self._file, self._known)
            what = "the original" if key == "original" else f"ratio {int(key) / STEPS:.4f}"
            said = f"perplexity {self._known[key]:.4f}" if math.isfinite(self._known[key]) else "cannot be met"
            self._run.notify(Event(f"{what}: held-out {said}", seconds=time.perf_counter() - started))
        return self._known[key]

    def planned(self, step: int) -> float:
        """The ratio of the plan at the ratio step / STEPS: larger, where the recipe's sizes are far apart."""
        ratio = step / STEPS
        try:
            return make_draft(self._fresh(), self._recipe.model_copy(update={"max_ppl_increase": None, "ratio": ratio})).ratio
        except BudgetError:
            return ratio

    def _trial(self, ratio: float) -> float:
        refine = self._recipe.refine
        if refine is not None:  # training of blocks is part of a trial; end-to-end training would be repeated in each
            refine = None if refine.block is None else refine.model_copy(update={"end_to_end": None})
        recipe = self._recipe.model_copy(update={"max_ppl_increase": None, "ratio": ratio, "refine": refine})
        run, out, view = self._run, self._folder / f"{ratio:.6f}", self._fresh()
        try:
            draft = make_draft(view, recipe, run.devices)
            self._carry_out(draft, view, run.calibration, out, devices=run.devices, shared=run.statistics_folder)
        except (BudgetError, NonFiniteError):
            discard(out)
            return math.inf
        small = ModelView(Location(str(out), out), trust_remote_code=view.trust_remote_code, prepare=install_stored)
        found = self._perplexity(small)
        discard(out)
        return found

    def _fresh(self) -> ModelView:
        """A new view of the original model, because a run replaces modules of its view by compressed ones."""
        view = self._run.view
        return ModelView(view.location, view.dtype, view.trust_remote_code)

    def _perplexity(self, view: ModelView) -> float:
        return perplexity(view, self._run.calibration.held_out, self._run.devices)
