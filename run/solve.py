"""Solving units: from the weights and statistics of a unit's targets to a solution for each target.

A unit may contain targets of several layers. The weights of the current layer are in memory. Those of other layers are read
from the checkpoint one module at a time, and their statistics are read from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor, nn

from ..compress.base import Method, Settings, Solution, TargetStats
from ..compress.forms.base import Form
from ..compress.options import Choice, JointOption, Option
from ..errors import NonFiniteError
from ..model.layer_forms import target_weight
from ..model.machine.workers import on_devices
from ..model.targets import Target
from ..model.view import ModelView
from ..plan.plan import Plan
from ..plan.units import Unit, sharing_inputs

ReadStatistics = Callable[[str, Sequence[str]], dict[str, TargetStats]]  # (layer, targets) -> target -> statistics


@dataclass(frozen=True)
class Together(Solution):
    """The solutions of all targets of a unit, combined into one solution of the unit.

    Args:
        members: one solution per target, in the unit's order.
        shares: choice of the unit -> the option of each target.
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
        raise ValueError("a unit of several targets has one form for each target, not one in all")

    def forms(self, choice: Choice) -> list[Form | None]:
        """Each target's form at a choice of the unit; None for a target that is kept dense."""
        each = zip(self.members, self.shares[choice], strict=True)
        return [None if option.choice.dense else member.form(option.choice) for member, option in each]

    @staticmethod
    def of(members: Sequence[Solution], options: Sequence[Option]) -> Together:
        """Combine the targets' solutions; `options` are the options of the unit."""
        return Together(members, {option.choice: option.members for option in options if isinstance(option, JointOption)})


def forms_at(unit: Unit, solution: Solution, choice: Choice) -> dict[Target, Form]:
    """The forms of a unit's targets at a choice, in float64, without the targets that are kept dense.

    Args:
        unit: one target, or several that are solved together.
        solution: the unit's solution; `Together` if it has several targets.
        choice: one of the unit's choices.
    """
    if not isinstance(solution, Together):
        return {unit.targets[0]: solution.form(choice)}
    made = zip(unit.targets, solution.forms(choice), strict=True)
    return {target: form.owned_by(unit.name) for target, form in made if form is not None}


def weight_at(view: ModelView, target: Target, layer: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """A target's weight (out, in) and its bias (out,) or None.

    Args:
        view: the model; a target of another layer is read from its checkpoint.
        layer: the loaded layer.
        name: its module path.
    """
    if view.layer_names[target.layer] == name:
        return target_weight(layer, name, target)
    view.load_module(target.module)
    other = view.layer_names[target.layer]
    found = target_weight(view.model.get_submodule(other), other, target)
    view.unload(target.module)  # the returned tensors keep their memory
    return found


@dataclass(frozen=True)
class Inputs:
    """What a unit is solved from, on one device; one entry per target.

    Args:
        weights: (out, in) each.
        biases: (out,) each, or None.
        statistics: of each target.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    statistics: Sequence[TargetStats]


class Gathering:
    """Gathers the inputs of units for several threads, one unit at a time.

    Args:
        view: the model; weights of layers other than the current one are read from its checkpoint, one module at a time.
        read: reads the statistics of targets.
    """

    def __init__(self, view: ModelView, read: ReadStatistics) -> None:
        self._view, self._read, self._one = view, read, Lock()

    def inputs(self, unit: Unit, layer: nn.Module, name: str, device: torch.device) -> Inputs:
        """The unit's inputs on a device.

        Args:
            layer: the loaded layer.
            name: its module path.
        """
        weights, biases = [], []
        by_layer: dict[int, list[str]] = {}
        for target in unit.targets:
            by_layer.setdefault(target.layer, []).append(target.name)
        held: dict[str, TargetStats] = {}
        with self._one:  # the checkpoint's modules and the store are not made for several threads
            for target in unit.targets:
                weight, bias = weight_at(self._view, target, layer, name)
                weights.append(weight.to(device))
                biases.append(None if bias is None else bias.to(device))
            for number, names in by_layer.items():
                held |= self._read(self._view.layer_names[number], names)
            return Inputs(weights, biases, [held[target.name].to(device) for target in unit.targets])


def solve_unit(
    method: Method, settings: Settings, unit: Unit, weights: Sequence[Tensor], statistics: Sequence[TargetStats]
) -> Sequence[Solution]:
    """One solution per target of a unit.

    Args:
        weights: (out, in) each, on the device that solves the unit.
        statistics: one per weight, on the same device.
    """
    if unit.slots is None:
        return [method.solve(weights[0], statistics[0], settings)]
    assert method.joint is not None
    return method.joint.solve(weights, statistics, unit.slots, settings)


@dataclass(frozen=True)
class SolvedTarget:
    """The chosen form of one target.

    Args:
        form: the stored form, on the CPU.
        error: its loss, relative to the loss of dropping the target.
        tokens: number of tokens in the target's statistics.
        damping: the ridge that was added to a gram, relative to the gram's mean diagonal.
        note: a remark of the method; empty if there is none.
    """

    form: Form
    error: float
    tokens: int
    damping: float
    note: str


class UnitSolver:
    """Solves units and makes the forms that the plan chose.

    Args:
        plan: the final plan.
        view: the model.
        devices: units are solved on all of them; those that share statistics, on one.
        stored: a function that reads statistics of other layers; None if no statistics are on disk.
    """

    def __init__(self, plan: Plan, view: ModelView, devices: Sequence[torch.device], stored: ReadStatistics | None) -> None:
        self._plan, self._view, self._devices, self._stored = plan, view, devices, stored
        self._steps = {step.target.name: step for step in plan.steps}
        self._dense = {name for name, step in self._steps.items() if step.choice.dense}

    def solve(
        self, units: Sequence[Unit], layer: nn.Module, index: int, statistics: dict[str, TargetStats]
    ) -> dict[str, SolvedTarget]:
        """Solve units: target name -> its form, for the targets of this and later layers that are not kept dense.

        Args:
            units: units with at least one target in this layer each.
            layer: the loaded layer.
            index: the layer's number.
            statistics: target name -> statistics, for the units' targets in this layer; they are removed when they are used,
                to free their memory.

        Raises:
            NonFiniteError: a value of a form is outside the range of the stored dtype.
        """
        name = self._view.layer_names[index]

        def read(home: str, names: Sequence[str]) -> dict[str, TargetStats]:
            return {each: statistics.pop(each) for each in names} if home == name else self._read(home, names)

        gathering = Gathering(self._view, read)
        found: dict[str, SolvedTarget] = {}

        def solve(together: Sequence[Unit], device: torch.device) -> None:
            for unit in together:
                inputs = gathering.inputs(unit, layer, name, device)
                solutions = solve_unit(*self._plan.recipe.compression, unit, inputs.weights, inputs.statistics)
                for target, solution, bias, seen in zip(unit.targets, solutions, inputs.biases, inputs.statistics, strict=True):
                    if target.layer >= index:  # an earlier, interrupted run wrote the others
                        found[target.name] = self._formed(unit, target, solution, bias, seen)

        on_devices(sharing_inputs(unit.without(self._dense) for unit in units), self._devices, solve)
        return found

    def _read(self, layer: str, names: Sequence[str]) -> dict[str, TargetStats]:
        if self._stored is None:
            raise ValueError(f"{names[0]} is solved with targets of other layers, whose statistics are not on disk")
        return self._stored(layer, names)

    def _formed(self, unit: Unit, target: Target, solution: Solution, bias: Tensor | None, stats: TargetStats) -> SolvedTarget:
        choice = self._steps[target.name].choice
        form = solution.form(choice).owned_by(unit.name).with_bias(bias).stored(self._plan.dtype)
        if not all(torch.isfinite(tensor).all() for tensor in form.tensors().values()):
            raise NonFiniteError(
                f"{target.name}: its factors are not finite in {self._plan.dtype}.", "Try --dtype bfloat16 or float32."
            )
        total = solution.total  # once: of most methods it is a product with the gram
        error = solution.loss(choice) / total if total > 0 else 0.0
        return SolvedTarget(form, error, stats.group.tokens, solution.damping, solution.note)
