"""Solving the units of the budget: weights and statistics of every member in, a solution for each out.

A unit may hold targets of several layers. Those of the layer that is at hand are read there; the weights of others come from
the source one module at a time, and their statistics from the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..compress.base import Method, Settings, Solution, TargetStats
from ..compress.forms.base import Form
from ..compress.options import Choice, JointOption, Option
from ..errors import NonFiniteError
from ..model.layer_forms import target_weight
from ..model.targets import Target
from ..model.view import ModelView
from ..plan.plan import Plan
from ..plan.units import Unit

ReadStatistics = Callable[[str, Sequence[str]], dict[str, TargetStats]]  # (layer, targets) -> target -> statistics


@dataclass(frozen=True)
class Together(Solution):
    """The solutions of a set's members as one, which answers the set's choices.

    Args:
        members: in the set's order.
        shares: choice of the set -> what each member gets.
    """

    members: Sequence[Solution]
    shares: Mapping[Choice, Sequence[Option]]

    def loss(self, choice: Choice) -> float:
        each = zip(self.members, self.shares[choice], strict=True)
        return sum(member.loss(option.choice) for member, option in each if not option.choice.dense)

    @property
    def total(self) -> float:
        return sum(member.total for member in self.members)

    def form(self, choice: Choice) -> Form:
        raise ValueError("a set has a form for each of its members, not one")

    def forms(self, choice: Choice) -> list[Form | None]:
        """Each member's form at a choice of the set, None for one that it leaves dense."""
        each = zip(self.members, self.shares[choice], strict=True)
        return [None if option.choice.dense else member.form(option.choice) for member, option in each]

    @staticmethod
    def of(members: Sequence[Solution], options: Sequence[Option]) -> Together:
        """The members' solutions, with what each gets at every option of the set."""
        return Together(members, {option.choice: option.members for option in options if isinstance(option, JointOption)})


def forms_at(unit: Unit, solution: Solution, choice: Choice) -> dict[Target, Form]:
    """The forms of a unit's targets at a choice, in float64; a target that it leaves dense has none.

    Args:
        solution: of the unit; `Together` for a set.
    """
    if not isinstance(solution, Together):
        return {unit.targets[0]: solution.form(choice)}
    made = zip(unit.targets, solution.forms(choice), strict=True)
    return {target: form.owned_by(unit.name) for target, form in made if form is not None}


def weight_at(view: ModelView, target: Target, layer: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """A target's weight (out, in) and bias (out,) or None: of the layer at hand (`name`), or from the source."""
    if view.layer_names[target.layer] == name:
        return target_weight(layer, name, target)
    view.load_module(target.module)
    other = view.layer_names[target.layer]
    found = target_weight(view.model.get_submodule(other), other, target)
    view.unload(target.module)  # the tensors live on as long as they are used
    return found


def solve_unit(
    method: Method, settings: Settings, unit: Unit, weights: Sequence[Tensor], statistics: Sequence[TargetStats]
) -> Sequence[Solution]:
    """One solution per target of a unit.

    Args:
        weights: (out, in) each, on the device that is to work.
        statistics: of the same targets.
    """
    if unit.slots is None:
        return [method.solve(weights[0], statistics[0], settings)]
    assert method.joint is not None
    return method.joint.solve(weights, statistics, unit.slots, settings)


@dataclass(frozen=True)
class SolvedTarget:
    """What became of one target.

    Args:
        form: as it is stored, on the CPU.
        error: its loss, relative to dropping the target altogether.
        tokens: that its statistics are over.
        damping: the ridge that was added to a gram, relative to its mean diagonal.
        note: what the method says of it.
    """

    form: Form
    error: float
    tokens: int
    damping: float
    note: str


def solved_forms(
    plan: Plan,
    view: ModelView,
    unit: Unit,
    layer: nn.Module,
    index: int,
    statistics: dict[str, TargetStats],
    stored: ReadStatistics | None,
    device: torch.device,
) -> dict[str, SolvedTarget]:
    """Solve a unit and form those of its targets that lie in this layer or a later one and are not left dense.

    Args:
        layer: number `index`, its weights loaded.
        statistics: of this layer's targets; those of the unit are taken out.
        stored: reads those of other layers.

    Raises:
        NonFiniteError: a form leaves the range of the checkpoint's dtype.
    """
    steps = {step.target.name: step for step in plan.steps}
    unit = _without(unit, {name for name, step in steps.items() if step.choice.dense})
    weights, biases, stats = [], [], []
    for target in unit.targets:
        weight, bias = weight_at(view, target, layer, view.layer_names[index])
        weights.append(weight.to(device))
        biases.append(None if bias is None else bias.to(device))
        if target.layer == index:
            stats.append(statistics.pop(target.name).to(device))  # what is solved needs its statistics no longer
            continue
        if stored is None:
            raise ValueError(f"{target.name} is solved with targets of other layers, whose statistics are on no disk")
        stats.append(stored(view.layer_names[target.layer], [target.name])[target.name].to(device))
    solutions = solve_unit(*plan.recipe.compression, unit, weights, stats)
    found: dict[str, SolvedTarget] = {}
    for target, solution, bias, each in zip(unit.targets, solutions, biases, stats, strict=True):
        if target.layer < index:
            continue  # finished by an earlier, interrupted run
        choice = steps[target.name].choice
        form = solution.form(choice).owned_by(unit.name).with_bias(bias).stored(plan.dtype)
        if not all(torch.isfinite(tensor).all() for tensor in form.tensors().values()):
            raise NonFiniteError(
                f"{target.name}: its factors are not finite in {plan.dtype}.", "Try --dtype bfloat16 or float32."
            )
        error = solution.loss(choice) / solution.total if solution.total > 0 else 0.0
        found[target.name] = SolvedTarget(form, error, each.group.tokens, solution.damping, solution.note)
    return found


def _without(unit: Unit, dense: Collection[str]) -> Unit:
    """The unit without those of its members that are left dense."""
    kept = [number for number, target in enumerate(unit.targets) if target.name not in dense]
    slots = None if unit.slots is None else tuple(unit.slots[number] for number in kept)
    return Unit(tuple(unit.targets[number] for number in kept), slots)
