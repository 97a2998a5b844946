"""The plan as a value: every target's form and bytes, what stays dense and why, and the memory that the run takes.

A `Draft` is what can be known before calibration, a `Plan` is what a run carries out.

`identity` is what a resumed run must agree with; the estimates are for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch

from ..calibrate.stats import Wanted, chunks_of, wanted
from ..compress.options import Choice, Option
from ..depth.model_edit import ModelEdit
from ..model.targets import Target
from ..model.view import Kept
from .budget import Found
from .recipe import Recipe
from .units import Unit, needs_of

PROBED = (2, 128)  # samples of calibration by which variants of single targets are compared, and tokens of each
PROBES_EACH = 3  # variants of one target, at most, for each way of compressing it


@dataclass(frozen=True)
class Step:
    """One target and what becomes of it; `bytes_halfway` is what it takes after the first of two steps."""

    target: Target
    choice: Choice
    bytes_before: int
    bytes_after: int
    why_dense: str = ""
    kept: bool = False
    bytes_halfway: int | None = None

    @property
    def leaves(self) -> bool:
        """Whether it goes with its layer, or its sub-layer."""
        return self.bytes_after == 0


@dataclass(frozen=True)
class Memory:
    """Predicted resident memory in bytes; docs/memory.md states the formula.

    Args:
        process: what the interpreter, its libraries and the tokenizer take, at every moment.
        moments: name of a moment of the run -> what it takes beside the process; only moments that this run has.
    """

    process: int = 0
    moments: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """The process and the largest moment."""
        return self.process + max(self.moments.values(), default=0)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A resolved compression: what `Draft` and `Plan` have in common.

    Args:
        recipe: with every default filled in.
        steps: one per target, in the order in which a forward reaches them.
        kept: everything that is not a target, with reasons.
        dtype: of the stored tensors.
        model: name, fingerprint of the files, configuration hash.
        whole_bytes: the model's bytes before (tied tensors counted once).
        whole_numel: its parameters before.
        batch: calibration samples that go through a layer at once.
        memory: the prediction.
        layers: of the original model.
        dropped: layers that go.
        dropped_beside: bytes of what is no target in them, less what a repair adds.
        left_out: what the checkpoint holds and the model has no place for.
        units: the targets that may be compressed, those that are solved together as one.
        options: unit -> the options that the method and the limits leave it, ascending in bytes.
        model_edit: sub-layers that go, and repairs.
        notes: what depth will take, in words.
        gap: how far the predicted loss may be from the best possible, relative to it; None where no solver was asked.
        found: what the search for a size has found; None where the recipe says the size, and before the search.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    kept: tuple[Kept, ...]
    dtype: torch.dtype
    model: dict[str, Any]
    whole_bytes: int
    whole_numel: int
    batch: int
    memory: Memory
    layers: int
    dropped: tuple[int, ...] = ()
    dropped_beside: int = 0
    left_out: tuple[Kept, ...] = ()
    units: tuple[Unit, ...] = ()
    options: Mapping[str, Sequence[Option]] = field(default_factory=dict, repr=False)
    model_edit: ModelEdit = field(default_factory=ModelEdit)
    notes: tuple[str, ...] = ()
    gap: float | None = None
    found: Found | None = None

    @property
    def renumbered(self) -> dict[int, int]:
        """Layer of the original -> its number in the result, for those that stay."""
        stay = [layer for layer in range(self.layers) if layer not in self.dropped]
        return {old: new for new, old in enumerate(stay)}

    @property
    def targets_before(self) -> int:
        return sum(step.bytes_before for step in self.steps)

    @property
    def targets_after(self) -> int:
        return sum(step.bytes_after for step in self.steps)

    @property
    def stages(self) -> list[tuple[str, int]]:
        """What is done one after the other, and the targets' bytes after each; nothing where it is one thing."""
        found, named = [], [step.method for step in self.recipe.steps]  # none where steps are among alternatives
        if any(step.leaves for step in self.steps):
            found.append(("layers dropped", sum(step.bytes_before for step in self.steps if not step.leaves)))
        if any(step.bytes_halfway is not None for step in self.steps):
            halfway = (step.bytes_after if step.bytes_halfway is None else step.bytes_halfway for step in self.steps)
            found.append((named[0] if named else "first steps", sum(halfway)))
        if found and found[-1][1] != self.targets_after:
            found.append((named[-1] if named else self.recipe.compression[0].name, self.targets_after))
        return found if len(found) > 1 else []

    @property
    def bits(self) -> float:
        """Mean bits that are stored for a weight of the targets, everything counted."""
        return 8 * self.targets_after / sum(step.target.numel for step in self.steps)

    @property
    def ratio(self) -> float:
        """Fraction of the targets' bytes that is removed."""
        return 1 - self.targets_after / self.targets_before

    @property
    def whole_after(self) -> int:
        return self.whole_bytes - self.targets_before + self.targets_after - self.dropped_beside

    @property
    def whole_ratio(self) -> float:
        """Fraction of the whole model's bytes that is removed."""
        return 1 - self.whole_after / self.whole_bytes

    def dense_bytes(self, unit: Unit) -> int:
        """Bytes of a unit's targets when dense."""
        return sum(target.numel * self.dtype.itemsize for target in unit.targets)

    def layer_steps(self, layer: int) -> list[Step]:
        return [step for step in self.steps if step.target.layer == layer]

    def solved(self, layer: int) -> list[Target]:
        """The targets of a layer that are not left dense."""
        return [step.target for step in self.layer_steps(layer) if not step.choice.dense]

    @cached_property
    def needs(self) -> dict[str, frozenset[str]]:
        """Target -> the statistics that are read of it where it is not left dense, and where another recipe shares them."""
        method = self.recipe.compression[0]
        return {step.target.name: method.needs for step in self.steps} | needs_of(method, self.units)

    def wanted(self, layer: int) -> Wanted:
        """The statistics to collect in a layer: those of the targets that are not left dense."""
        return wanted(self.solved(layer), self.needs)

    def chunks(self, layer: int) -> list[list[Target]]:
        """The solved targets of a layer, in the chunks in which their statistics are collected; a unit is in one chunk."""
        units = ([target.name for target in unit.targets] for unit in self.units if len(unit.targets) > 1)
        return chunks_of(self.solved(layer), self.wanted(layer).nbytes, units)

    def identity(self, calibration_hash: str) -> dict[str, Any]:
        """What a run is of; equal identities give equal bytes on one machine."""
        recipe = self.recipe.resolved()
        recipe["calibration"] |= {"tokens": calibration_hash}
        return {
            "recipe": recipe,
            "model": {key: value for key, value in self.model.items() if key != "name"},
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
        }


class Plan(Planned):
    """What a run carries out: every target has its final option."""


class Draft(Planned):
    """What is known from the recipe and the files' headers alone.

    Where the budget looks at losses it is shared out evenly here, layers that a score will choose are assumed to be the last
    ones, and a size that is searched is assumed. `planner.make_plan` makes the plan of it.
    """

    def settled(self) -> Plan:
        """The same as a plan, where nothing is left to be measured."""
        return Plan(**{each.name: getattr(self, each.name) for each in fields(self)})
