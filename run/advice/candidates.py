"""Recipes that may reach a size: their plans, what each needs to be opened, and the same recipe on a sample of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...calibrate.data import CalibrationSpec
from ...errors import BudgetError, ModelError
from ...model.view import ModelView
from ...plan.load_recipe import load_recipe
from ...plan.plan import Draft
from ...plan.planner import make_draft
from ...plan.recipe import Recipe

TRIED = ("gptq", "lrc-fast", "narrow", "svd-llm", "block-influence")
"""One recipe of each kind that is quick: codes, channels and low rank, plain channels, low rank alone, whole layers."""

LONGER = {
    "trellis": "3.5 bits and fewer",
    "lrc-best": "1 to 6 bits for each matrix, one backward pass",
    "lrc-gradient": "lrc-fast with a backward pass",
    "lrc-best-16": "16 bits, then training",
}
"""Recipes that lose less or take longer: they are planned only, unless they are named; why a person may want them."""

CODES, NUMBERS, PLAIN = "codes", "16-bit numbers", "plain checkpoint"
_COARSE = 0.02  # a plan may miss a ratio by this much: a target that no rank fits stays dense


@dataclass(frozen=True)
class Candidate:
    """A recipe that reaches the size.

    Args:
        name: of the recipe.
        draft: its plan.
        amount: the option of `lrc compress` that asks for this size, without its dashes, and its value.
    """

    name: str
    draft: Draft
    amount: tuple[str, str]

    @property
    def recipe(self) -> Recipe:
        """As planned, with the amount."""
        return self.draft.recipe

    @property
    def kind(self) -> str:
        """What the result holds: codes, numbers of the checkpoint's own dtype in lrc's forms, or a plain checkpoint."""
        recipe, steps = self.recipe, [step for step in self.draft.steps if not step.choice.dense]
        repaired = recipe.depth is not None and recipe.depth.repair is not None
        if recipe.depth is not None and recipe.compresses_nothing and recipe.depth.granularity == "layer" and not repaired:
            return PLAIN
        if recipe.alternatives or any(step.choice.bits is not None for step in steps):
            return CODES
        channels = {step.choice.channels for step in steps}
        even = recipe.allocation == "uniform" and recipe.depth is None and len(channels) == 1 and channels != {None}
        return PLAIN if even else NUMBERS

    @property
    def sampled(self) -> bool:
        """Whether some of its layers alone can be tried; else (it drops layers, or solves several together) only all can."""
        return self.recipe.depth is None and not self.recipe.compression[0].across_layers


def candidates(
    view: ModelView, names: Sequence[str], amount: Mapping[str, Any], devices: Sequence[torch.device]
) -> tuple[list[Candidate], dict[str, str]]:
    """Plan recipes at an amount, from headers alone.

    Args:
        names: of recipes; shipped ones or files.
        amount: {'ratio': fraction} or {'size': '300MB'}.
        devices: of the runs, for the predicted memory.

    Returns:
        Those that reach it, and for every other why it does not.

    Raises:
        RecipeError: a file is no recipe.
    """
    found, refused = [], {}
    for name in names:
        try:
            found.append(_candidate(view, name, amount, devices))
        except (BudgetError, ModelError) as error:
            refused[name] = error.what
    return found, refused


def _candidate(view: ModelView, name: str, amount: Mapping[str, Any], devices: Sequence[torch.device]) -> Candidate:
    """A recipe at an amount; one that keeps some targets is asked for the size that the ratio comes to for all of them."""
    draft = make_draft(view, load_recipe(name, dict(amount)), devices)
    asked = amount.get("ratio")
    if asked is not None and draft.recipe.keep and draft.ratio < asked - _COARSE:
        size = int(draft.whole_bytes - asked * draft.targets_before) + draft.header_bytes
        amount = {"size": f"{size}B"}
        draft = make_draft(view, load_recipe(name, amount), devices)
    ((option, value),) = amount.items()
    if asked is not None and draft.ratio < asked - _COARSE:
        raise BudgetError(f"It removes {draft.ratio:.0%} of the targets' bytes, and no more.")
    return Candidate(name, draft, (option, f"{value:g}" if option == "ratio" else str(value)))


def sampled_layers(view: ModelView, most: int) -> list[int]:
    """At most `most` layers with targets, in the middles of as many equal parts of the model."""
    layers = sorted({target.layer for target in view.targets})
    count = min(most, len(layers))
    return [layers[int((part + 0.5) * len(layers) / count)] for part in range(count)]


def trial_recipe(candidate: Candidate, view: ModelView, layers: Sequence[int], calibration: CalibrationSpec) -> Recipe:
    """The recipe on some layers alone: all others are kept dense, and those lose the share that the plan takes of each.

    Training after compression is left out: it takes longer than everything else.

    Args:
        layers: numbers of the layers that are compressed; ignored where only the whole can be tried.
        calibration: in place of the recipe's own.
    """
    recipe, draft = candidate.recipe, candidate.draft
    changes: dict[str, Any] = {"calibration": calibration, "refine": None}
    if not candidate.sampled:
        return recipe.model_copy(update=changes)
    open_names = {target.name for unit in draft.units if draft.options[unit.name] for target in unit.targets}
    dense = {step.target.name: step.bytes_before for step in draft.steps}
    whole, opened = draft.targets_before, sum(dense[name] for name in open_names)
    here = sum(step.bytes_before for step in draft.steps if step.target.name in open_names and step.target.layer in layers)
    share = _share(draft, opened)
    # an even ratio holds for each open target, every other rule divides the bytes of all targets
    even = recipe.allocation == "uniform" and not recipe.limits
    kept = [f"{view.layer_names[layer]}.*" for layer in sorted({t.layer for t in view.targets} - set(layers))]
    return recipe.model_copy(
        update=changes | {"ratio": share if even else share * here / whole, "size": None, "keep": (*recipe.keep, *kept)}
    )


def _share(draft: Draft, opened: int) -> float:
    """The fraction of its bytes that every open target loses in a plan, on average."""
    recipe = draft.recipe
    if recipe.ratio is not None:
        return recipe.ratio if recipe.allocation == "uniform" else recipe.ratio * draft.targets_before / opened
    size = recipe.amounts["size"]
    beside = draft.whole_bytes - draft.targets_before + draft.header_bytes
    return min(max((draft.targets_before + beside - size) / opened, 0.0), 1.0)
