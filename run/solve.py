"""Solving the units of the budget: weights and statistics of every member in, a solution for each out.

A unit may hold targets of several layers. Those of the layer that is at hand are read there; the weights of others come from
the source one module at a time, and their statistics from the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


class UnitSolver:
    """Solves units of a plan and makes the forms that the plan chose.

    Args:
        plan: what each target gets.
        view: the model; weights of other layers than the one at hand are read from it, one module at a time.
        device: where units are solved.
        stored: reads statistics of other layers; None where there are none on disk.
    """

    def __init__(self, plan: Plan, view: ModelView, device: torch.device, stored: ReadStatistics | None) -> None:
        self._plan, self._view, self._device, self._stored = plan, view, device, stored
        self._steps = {step.target.name: step for step in plan.steps}
        self._dense = {name for name, step in self._steps.items() if step.choice.dense}

    def solve(self, unit: Unit, layer: nn.Module, index: int, statistics: Mapping[str, TargetStats]) -> dict[str, SolvedTarget]:
        """Target -> its form, of those that lie in this layer or a later one and are not left dense.

        Args:
            layer: number `index`, its weights loaded.
            statistics: of the unit's targets in this layer.

        Raises:
            NonFiniteError: a form leaves the range of the checkpoint's dtype.
        """
        unit, name = unit.without(self._dense), self._view.layer_names[index]
        weights, biases, stats = [], [], []
        for target in unit.targets:
            weight, bias = weight_at(self._view, target, layer, name)
            weights.append(weight.to(self._device))
            biases.append(None if bias is None else bias.to(self._device))
            seen = statistics[target.name] if target.layer == index else self._read(target)
            stats.append(seen.to(self._device))
        solutions = solve_unit(*self._plan.recipe.compression, unit, weights, stats)
        return {
            target.name: self._formed(unit, target, solution, bias, seen)
            for target, solution, bias, seen in zip(unit.targets, solutions, biases, stats, strict=True)
            if target.layer >= index  # an earlier, interrupted run finished the others
        }

    def _read(self, target: Target) -> TargetStats:
        if self._stored is None:
            raise ValueError(f"{target.name} is solved with targets of other layers, whose statistics are not on disk")
        return self._stored(self._view.layer_names[target.layer], [target.name])[target.name]

    def _formed(self, unit: Unit, target: Target, solution: Solution, bias: Tensor | None, stats: TargetStats) -> SolvedTarget:
        choice = self._steps[target.name].choice
        form = solution.form(choice).owned_by(unit.name).with_bias(bias).stored(self._plan.dtype)
        if not all(torch.isfinite(tensor).all() for tensor in form.tensors().values()):
            raise NonFiniteError(
                f"{target.name}: its factors are not finite in {self._plan.dtype}.", "Try --dtype bfloat16 or float32."
            )
        error = solution.loss(choice) / solution.total if solution.total > 0 else 0.0
        return SolvedTarget(form, error, stats.group.tokens, solution.damping, solution.note)
