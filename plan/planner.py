"""The planner: a recipe and a model in, a plan out (plan/plan.py).

It makes the draft from the configuration and the files' headers before anything runs, and the plan after the run has measured
the losses.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ..calibrate.layerwise import TOKENS_PER_BATCH
from ..checkpoint.merging import SHARD_BYTES
from ..compress.base import DENSE, Curve
from ..compress.options import Choice, Option, Shape
from ..depth.candidates import Removable, enough_sublayers, open_sublayers
from ..depth.cost import depth_lines
from ..depth.model_edit import ModelEdit
from ..depth.renumbering.shallower import Shallower
from ..errors import BudgetError, RecipeError
from ..model.targets import Target
from ..model.view import ModelView
from .allocation import Shared, allocate
from .budget import ASK, ASSUMED, Footprint, Found, header_bytes, said, share_of, targets_bytes
from .knapsack import uniform
from .limits import Bounds, bounds_of, even, matches, may_be_dense, unmatched, within
from .machine.disk import predict_disk
from .memory import predict_memory
from .plan import Draft, Memory, Plan, Planned, Step
from .recipe import Recipe
from .units import Unit, options_of, shape_of, units_of

P = TypeVar("P", bound=Planned)


def make_draft(
    view: ModelView, recipe: Recipe, devices: Sequence[torch.device] = (torch.device("cpu"),), found: Found | None = None
) -> Draft:
    """Resolve a recipe for a model as far as the files' headers allow.

    Args:
        devices: of the run, for the memory prediction.
        found: result of the search, for a recipe with `max_ppl_increase`; without it the draft assumes `budget.ASSUMED`.

    Raises:
        BudgetError: the recipe gives no budget, or one that cannot be met.
        ModelError: layers shall be dropped, and no configuration describes the model without them.
        RecipeError: a pattern of `keep` or `limits` matches no target, or limits contradict each other.
    """
    return _planned(Draft, view, recipe, devices, _Known(found=found))


def make_plan(
    view: ModelView,
    draft: Draft,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    *,
    curves: Mapping[str, Curve] | None = None,
    model_edit: ModelEdit | None = None,
) -> Plan:
    """Make the final plan from the measured losses and scores.

    Args:
        devices: of the run, for the memory prediction.
        curves: loss of each unit at each of its options; None if the allocation needs no losses.
        model_edit: the layers or sub-layers to drop, and repairs; None if the recipe has no `depth`.

    Raises:
        BudgetError: the budget cannot be met.
    """
    return _planned(Plan, view, draft.recipe, devices, _Known(curves, model_edit, draft.found, draft.max_shard_bytes))


@dataclass(frozen=True)
class _Known:
    """The results of the measurements so far; None for one that is not available."""

    curves: Mapping[str, Curve] | None = None
    model_edit: ModelEdit | None = None
    found: Found | None = None
    max_shard_bytes: int = SHARD_BYTES


def _planned(kind: type[P], view: ModelView, recipe: Recipe, devices: Sequence[torch.device], known: _Known) -> P:
    recipe = _counted(view, recipe)
    kept = _kept_dense(view.targets, recipe.keep, len(view.layers))
    bounds = bounds_of(view.targets, recipe.limits, len(view.layers))
    model_edit = assumed(view, recipe) if known.model_edit is None else known.model_edit
    scope = _scope(view, recipe, model_edit, kept, bounds)
    stay = scope.kept.keys() - scope.dropped | scope.unshrinkable
    footprint = _footprint(view, scope.shapes, scope.dropped, scope.dropped_extra_bytes, stay)
    amounts = recipe.amounts
    if recipe.bits_of_codes:
        amounts["bits"] = None  # the settings fix the size
    if recipe.max_ppl_increase is not None:
        amounts["ratio"] = ASSUMED if known.found is None else known.found.ratio
    if known.curves is None:
        shared = Shared(_evenly(recipe, scope, amounts, footprint))
    else:
        shared = _by_losses(view, recipe, scope, known.curves, targets_bytes(amounts, footprint))
    _require_something_to_remove(recipe, scope)
    plan = kind(
        recipe=recipe,
        steps=_steps(view.targets, scope, shared.options),
        kept=tuple(view.kept),
        dtype=view.dtype,
        model={"name": view.location.name, "type": view.config.model_type},
        whole_bytes=view.nbytes,
        whole_numel=view.numel,
        batch=max(1, TOKENS_PER_BATCH // recipe.calibration.length),
        memory=Memory(),
        layers=len(view.layers),
        unread=view.unread_bytes,
        dropped=model_edit.dropped,
        dropped_beside=scope.dropped_extra_bytes,
        left_out=tuple(view.left_out),
        weight_notes=view.notes,
        units=scope.units,
        options=scope.options,
        model_edit=model_edit,
        notes=depth_lines(view, recipe.dropping, recipe.calibration, model_edit),
        gap=shared.gap,
        found=known.found,
        shallower=described(view, model_edit.dropped),
        files_left_out=view.location.beside(code=view.trust_remote_code).left_out,
        header_bytes=footprint.headers,
        file_bytes=view.file_bytes,
        largest_part=_largest_part(view),
        max_shard_bytes=known.max_shard_bytes,
    )
    return replace(plan, memory=predict_memory(view, plan, devices), scratch=predict_disk(view, plan))


@dataclass(frozen=True)
class _Scope:
    """The scope of the budget: the units that it decides on, and the targets that are settled before.

    Args:
        shapes: shape of every target, by name.
        kept: target that stays dense under any budget -> the pattern that keeps it.
        dropped: dropped target -> the reason.
        dropped_extra_bytes: bytes of dropped tensors that are no targets, less the bytes that a repair adds.
        units: the units that the budget decides on.
        options: unit -> the options that the method offers and the limits allow.
        never_dense: units that may not stay dense because of their limits.
        compresses_nothing: whether the recipe compresses no matrix.
    """

    shapes: Mapping[str, Shape]
    kept: Mapping[str, str]
    dropped: Mapping[str, str]
    dropped_extra_bytes: int
    units: tuple[Unit, ...]
    options: Mapping[str, Sequence[Option]]
    never_dense: frozenset[str]
    compresses_nothing: bool

    @property
    def unshrinkable(self) -> set[str]:
        """Targets of units for which the method has no option: they stay dense although nothing keeps them."""
        closed = [unit for unit in self.units if not self.options[unit.name] and not self.compresses_nothing]
        return {target.name for unit in closed for target in unit.targets}

    @property
    def dense(self) -> dict[str, int]:
        """Dense bytes of each unit, by name."""
        return {unit.name: sum(self.shapes[target.name].nbytes for target in unit.targets) for unit in self.units}


def _scope(
    view: ModelView, recipe: Recipe, model_edit: ModelEdit, kept: dict[str, str], bounds: Mapping[str, Bounds]
) -> _Scope:
    element = view.dtype.itemsize
    shapes = {target.name: shape_of(target, element) for target in view.targets}
    zeroed = {target.name for target in model_edit.zeroed}
    dropped = {
        target.name: "its sub-layer is dropped" if target.name in zeroed else "its layer is dropped"
        for target in view.targets
        if target.layer in model_edit.dropped or target.name in zeroed
    }
    kept = {name: each.why_min for name, each in bounds.items() if each.dense} | kept
    method, settings = recipe.compression
    free = [target for target in view.targets if target.name not in kept and target.name not in dropped]
    units = units_of(method, settings, free)
    own = options_of(units, method, settings, recipe.rank_multiple, element)
    options = {unit.name: within(unit, bounds, shapes, own[unit.name]) for unit in units}
    for unit in units:  # the limits may allow only the dense form
        limited = [bounds[target.name].why_min for target in unit.targets if target.name in bounds]
        if limited and not options[unit.name]:
            kept |= dict.fromkeys((target.name for target in unit.targets), next((why for why in limited if why), ""))
    units = [unit for unit in units if unit.name not in kept]
    never_dense = frozenset(unit.name for unit in units if not may_be_dense(unit, bounds))
    targets_alone = sum(shapes[name].nbytes for name in dropped if name not in zeroed)
    biases = sum(target.out_features for target in model_edit.zeroed if target.bias)
    extra = sum(map(view.layer_nbytes, model_edit.dropped)) - targets_alone + element * (biases - model_edit.added)
    return _Scope(shapes, kept, dropped, extra, tuple(units), options, never_dense, method is DENSE)


def _evenly(recipe: Recipe, scope: _Scope, amounts: Mapping[str, Any], footprint: Footprint) -> dict[str, Option]:
    """The option of every unit before losses are known: an even share, or the largest option if the method decides."""
    options = {name: (whole, scope.options[name]) for name, whole in scope.dense.items()}
    if recipe.allocation == "own":
        return {name: own[-1] if own else Option(Choice(), whole) for name, (whole, own) in options.items()}
    if recipe.limits:
        sized = any(each is not None for each in amounts.values())
        if not sized and (recipe.allocation != "uniform" or not scope.never_dense):  # with floors alone everything stays dense
            raise BudgetError("How much should go? The recipe names no ratio, and its limits determine none.", ASK)
        return _even(options, scope.never_dense, amounts, footprint)
    share = _share(amounts, footprint)
    return uniform(options, share, said(amounts, share))


def _by_losses(
    view: ModelView,
    recipe: Recipe,
    scope: _Scope,
    curves: Mapping[str, Curve],
    budget: int | None,
) -> Shared:
    """The option of every unit by the recipe's rule and the measured losses; `budget` is the bytes for all targets."""
    in_units = {target.name for unit in scope.units for target in unit.targets}
    settled = {name: shape.nbytes for name, shape in scope.shapes.items() if name not in in_units}
    return allocate(recipe, settled | scope.dense, curves, budget, view.targets, scope.never_dense)


def _require_something_to_remove(recipe: Recipe, scope: _Scope) -> None:
    """Refuse a request to remove bytes if the recipe has no form for any target that is smaller than the target.

    Raises:
        BudgetError: it has none, or `keep` and `limits` leave no target open.
    """
    if not recipe.asks_for_less or scope.compresses_nothing or scope.dropped or any(scope.options.values()):
        return
    name = recipe.compression[0].name
    if not scope.units:
        raise BudgetError("The recipe keeps every target dense: there is nothing to remove.", "Keep fewer targets.")
    raise BudgetError(
        f"{name} has no form of any target that is smaller than the target: there is nothing to remove.",
        "Lower rank_multiple or the method's rank or bits (--set settings.…), or take another recipe (lrc recipe list).",
    )


def _steps(targets: Iterable[Target], scope: _Scope, options: Mapping[str, Option]) -> tuple[Step, ...]:
    """One step per target, in the targets' order, from the options of the units."""
    nbytes = {name: shape.nbytes for name, shape in scope.shapes.items()}
    chosen: dict[str, Option] = {}
    for unit in scope.units:
        chosen |= unit.shared_out(options[unit.name], scope.options[unit.name], nbytes)

    def step(target: Target) -> Step:
        before = nbytes[target.name]
        if target.name in scope.dropped:
            return Step(target, Choice(), before, 0, scope.dropped[target.name])
        option = chosen.get(target.name, Option(Choice(), before))
        why = _why_dense(target, option.choice, scope)
        return Step(target, option.choice, before, option.nbytes, why, target.name in scope.kept, option.halfway)

    return tuple(map(step, targets))


def _largest_part(view: ModelView) -> int:
    """Bytes of the largest layer, or part outside the layers."""
    outside = (sum(tensor.nbytes for tensor in view.outside_tensors(part).values()) for part in view.outside_parts())
    return max(*map(view.layer_nbytes, range(len(view.layers))), *outside)


def described(view: ModelView, dropped: Sequence[int]) -> dict[str, Any] | None:
    """The configuration of the model without these layers, as config.json holds it; None where none is dropped.

    Raises:
        ModelError: no configuration describes it.
    """
    if not dropped:
        return None
    found: dict[str, Any] = json.loads(Shallower.of(view).config(dropped).to_json_string())
    return found


def assumed(view: ModelView, recipe: Recipe) -> ModelEdit:
    """Assume, before scores are known, that the recipe drops the last unprotected layers or sub-layers that can go.

    Raises:
        ModelError: no configuration describes the model without so many layers.
    """
    spec = recipe.dropping
    if spec is None:
        return ModelEdit()
    if spec.granularity == "layer":
        removable = Removable(view, spec)
        return ModelEdit(removable.dropped(removable.assumed))
    gone: list[int] = []
    parts, enough = open_sublayers(view.sublayers, len(view.layers), spec), enough_sublayers(view.sublayers, spec)
    while not enough(gone):
        gone.append(parts.pop())
    return ModelEdit.without([view.sublayers[part] for part in sorted(gone)])


def _counted(view: ModelView, recipe: Recipe) -> Recipe:
    """Convert a budget in bits or as a size to a number of layers to drop, or to a ratio for sub-layers.

    The number is computed from the smallest layers, so that it is enough whichever layers the score chooses.
    """
    if recipe.depth is None or recipe.depth.drop is not None or recipe.depth.ratio is not None:
        return recipe
    if recipe.bits is None and recipe.size is None:
        return recipe
    element = view.dtype.itemsize
    shapes = {target.name: shape_of(target, element) for target in view.targets}
    first, last = recipe.depth.protect_first, len(view.layers) - recipe.depth.protect_last
    footprint = _footprint(view, shapes, (), 0, ())
    if recipe.depth.granularity != "layer":  # the bytes of their targets decide how many sub-layers to drop
        excess = footprint.targets - (targets_bytes(recipe.amounts, footprint) or 0)
        ratio = min(1.0, max(excess, 0) / footprint.targets)
        return recipe.model_copy(update={"depth": recipe.depth.model_copy(update={"ratio": ratio})})
    if recipe.size is not None:  # dropping a layer removes its other tensors too
        sizes = sorted(view.layer_nbytes(layer) for layer in range(first, last))
        excess = footprint.whole + footprint.headers - (recipe.amounts["size"] or 0)
    else:
        of_layer = [sum(shapes[t.name].nbytes for t in view.targets if t.layer == layer) for layer in range(first, last)]
        sizes, excess = sorted(of_layer), footprint.targets - (targets_bytes(recipe.amounts, footprint) or 0)
    count = next((n for n in range(1, len(sizes) + 1) if sum(sizes[:n]) >= excess), len(sizes) + 1)
    return recipe.model_copy(update={"depth": recipe.depth.model_copy(update={"drop": count})})


def _footprint(
    view: ModelView, shapes: Mapping[str, Shape], dropped: Collection[str], extra: int, kept: Collection[str]
) -> Footprint:
    """The parts of the model's bytes before compression.

    Args:
        shapes: shapes of all targets, by name.
        dropped: names of the dropped targets.
        extra: bytes of dropped tensors that are no targets, less the bytes that a repair adds.
        kept: names of the targets that stay dense.
    """
    tensors = dict.fromkeys((name for name, _ in view.model.named_parameters()), False) | dict.fromkeys(shapes, True)
    gone = sum(shapes[name].nbytes for name in dropped)
    return Footprint(
        sum(shape.nbytes for shape in shapes.values()),
        sum(shape.out_features * shape.in_features for shape in shapes.values()),
        view.dtype.itemsize,
        view.nbytes,
        gone + extra,
        gone,
        sum(shapes[name].nbytes for name in kept),
        header_bytes(tensors, len(view.layers) + len(view.outside_parts())),
    )


def _share(amounts: Mapping[str, Any], footprint: Footprint) -> float | None:
    """The fraction of its bytes that every open target gives up so that all steps together meet the budget; None without one.

    A ratio applies to each open target, as in the papers, and kept targets do not change it. Bits and sizes apply to all
    targets together.
    """
    ratio: float | None = amounts["ratio"]
    if ratio is not None:
        stay = footprint.targets - footprint.gone_targets
        return max(0.0, 1 - (1 - ratio) * footprint.targets / stay) if footprint.gone_targets else ratio
    budget = targets_bytes(amounts, footprint)
    return None if budget is None else share_of(budget, footprint)


def _even(
    options: Mapping[str, tuple[int, Sequence[Option]]],
    never_dense: frozenset[str],
    amounts: Mapping[str, Any],
    footprint: Footprint,
) -> dict[str, Option]:
    """An even share within the limits; without a budget, the largest size that the limits of each unit allow."""
    share = _share(amounts, footprint)
    budget = None if share is None else int((1 - share) * footprint.open + 1e-6)
    found = even(options, options.keys() - never_dense, budget)
    return {name: option or Option(Choice(), options[name][0]) for name, option in found.items()}


def _kept_dense(targets: list[Target], patterns: tuple[str, ...], layers: int) -> dict[str, str]:
    """The pattern that keeps each kept target, by target name; patterns match full names and roles."""
    found: dict[str, str] = {}
    problems = []
    for pattern in patterns:
        hits = [target.name for target in targets if matches(target, pattern, layers)]
        if not hits:
            problems.append(unmatched("keep", pattern, targets))
        found.update(dict.fromkeys(hits, pattern))
    if problems:
        raise RecipeError("recipe", problems)
    return found


def _why_dense(target: Target, choice: Choice, scope: _Scope) -> str:
    if target.name in scope.kept:
        return f"kept by '{scope.kept[target.name]}'"
    if not choice.dense:
        return ""
    if scope.compresses_nothing:
        return "the recipe compresses no matrix"
    return "nothing that the method offers is smaller, or the budget (with allocation own the method) leaves it whole"
