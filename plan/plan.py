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

from ..calibrate.stats import Wanted, wanted
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
    """Predicted peak of resident memory in bytes, by part; docs/memory.md states the formula."""

    process: int = 0
    reading: int = 0
    outside: int = 0
    layer: int = 0
    activations: int = 0
    statistics: int = 0
    forward: int = 0
    solve: int = 0
    factors: int = 0
    blocks: int = 0
    whole: int = 0
    depth: int = 0
    probes: int = 0
    writing: int = 0
    backward: int = 0

    @property
    def peak(self) -> int:
        """The largest moment: reading or writing what lies outside the layers, embedding the tokens, a layer's forward, solving
        its largest target, training, a backward pass, depth, probes, calibration text that the model writes."""
        embedding = self.outside + self.activations
        forward = self.layer + self.activations + self.statistics + self.forward
        solve = self.layer + self.activations + self.statistics + self.solve + self.factors
        block = self.layer + self.activations + self.blocks if self.blocks else 0
        back = self.activations + self.backward if self.backward else 0
        apart = (self.reading, self.whole, self.depth, self.probes, self.writing)
        return self.process + max(embedding, forward, solve, block, back, *apart)


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
