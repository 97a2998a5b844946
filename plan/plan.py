"""The plan as a value: form and bytes of every target, the reason if a target stays dense, and the predicted memory.

A `Draft` holds everything that is known before calibration; a run executes a `Plan`.

A resumed run must have the same `identity`; the estimates are only for the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch

from ..calibrate.data import Calibration
from ..calibrate.packing import token_hash
from ..calibrate.stats import Wanted, chunks_of, wanted
from ..checkpoint.merging import SHARD_BYTES
from ..compress.base import BACKWARD_NEEDS
from ..compress.options import Choice, Option
from ..depth.model_edit import ModelEdit
from ..model.targets import Target
from ..model.view import Kept
from .budget import Found, readable
from .recipe import Recipe
from .units import Unit, needs_of

IDENTITY = 2  # version of what an identity holds; 1 sampled the checkpoint's files
PROBED = (2, 128)  # calibration samples that compare variants of single targets, and tokens per sample
DELETED_EARLY = ("activations", "trials")  # of the files beside the result: gone before its weights are written
PROBES_EACH = 3  # maximum number of variants of one target for each alternative


@dataclass(frozen=True)
class Step:
    """One target and its planned form.

    Args:
        target: the target.
        choice: its chosen form.
        bytes_before: its dense bytes.
        bytes_after: its bytes in the result; 0 if it is dropped.
        why_dense: why it stays dense or is dropped; empty if it is compressed.
        kept: whether `keep` or `limits` make it stay dense.
        bytes_halfway: its bytes after the first of two steps; None with one step.
    """

    target: Target
    choice: Choice
    bytes_before: int
    bytes_after: int
    why_dense: str = ""
    kept: bool = False
    bytes_halfway: int | None = None

    @property
    def leaves(self) -> bool:
        """Whether the target is dropped with its layer or its sub-layer."""
        return self.bytes_after == 0


@dataclass(frozen=True)
class Memory:
    """Predicted memory in bytes; docs/memory.md states the formula.

    Args:
        process: bytes of main memory that the interpreter, its libraries and the tokenizer take all the time.
        moments: moment of the run -> bytes of main memory in addition to the process; only moments that occur in this run.
        on_gpu: moment of the run -> bytes in the memory of each GPU; empty where the run computes on the processor.
    """

    process: int = 0
    moments: Mapping[str, int] = field(default_factory=dict)
    on_gpu: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of the process and the largest moment together."""
        return self.process + max(self.moments.values(), default=0)

    @property
    def gpu_peak(self) -> int:
        """Bytes of the largest moment on a GPU; 0 where there is none."""
        return max(self.on_gpu.values(), default=0)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A resolved compression: the common base of `Draft` and `Plan`.

    Args:
        recipe: the recipe with all defaults.
        steps: one per target, in the order of the forward pass.
        kept: parameters outside the targets, with the reason why they are not compressed.
        dtype: dtype of the stored tensors.
        model: name and type.
        whole_bytes: bytes of the original model (tied tensors count once).
        whole_numel: parameters of the original model.
        batch: calibration samples that pass through a layer at once.
        memory: predicted memory.
        scratch: kind of file -> predicted bytes that the run keeps on the disk beside the weights of the result.
        layers: number of layers of the original model.
        unread: bytes of the checkpoint that have to be read for its fingerprint; those of the other files are remembered.
        dropped: indices of the dropped layers.
        dropped_beside: bytes of dropped tensors that are no targets, less the bytes that a repair adds.
        left_out: tensors of the checkpoint that the model does not use.
        weight_notes: what a person should know about which weights are read, and how.
        units: units that the budget decides on.
        options: unit -> the options that the method offers and the limits allow, ascending in bytes.
        model_edit: dropped layers and sub-layers, and repairs.
        notes: the cost of `depth`, in words.
        gap: upper bound on the relative distance of the predicted loss from the best possible one; None without a solver.
        found: result of the search for a size; None before the search, and if the recipe gives the size.
        shallower: config.json of the model without the dropped layers; None if no layer is dropped.
        files_left_out: reason -> files and folders of the checkpoint that are not copied into the result.
        header_bytes: upper bound on the bytes of the files' headers.
        file_bytes: bytes of the original's weight files on the disk; less than `whole_bytes` where they are quantized.
        largest_part: bytes of the original's largest layer, or part outside the layers.
        max_shard_bytes: the largest weight file of the result; a single tensor may be larger.
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
    unread: int = 0
    dropped: tuple[int, ...] = ()
    dropped_beside: int = 0
    left_out: tuple[Kept, ...] = ()
    weight_notes: tuple[str, ...] = ()
    units: tuple[Unit, ...] = ()
    options: Mapping[str, Sequence[Option]] = field(default_factory=dict, repr=False)
    model_edit: ModelEdit = field(default_factory=ModelEdit)
    notes: tuple[str, ...] = ()
    gap: float | None = None
    found: Found | None = None
    shallower: Mapping[str, Any] | None = field(default=None, repr=False)
    files_left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    header_bytes: int = 0
    file_bytes: int = 0
    largest_part: int = 0
    max_shard_bytes: int = SHARD_BYTES
    scratch: Mapping[str, int] = field(default_factory=dict)

    @property
    def request(self) -> str:
        """The size that was asked for beside the planned one, in the same unit; empty if the recipe asks for none.

        Where the two differ by more than a hundredth of the targets' bytes, it says why.
        """
        recipe = self.recipe
        if recipe.max_ppl_increase is not None:
            found = "" if self.found is None else f", found {self.found.increase:+.2%} at ratio {self.ratio:.4g}"
            return f"asked a perplexity of at most {recipe.max_ppl_increase:+.2%}{found}"
        asked = self._asked
        if asked is None:
            return "" if self.targets_after < self.targets_before or recipe.allocation == "own" else "nothing gets smaller"
        budget, said = asked
        reason = ""
        if abs(budget - self.targets_after) > 0.01 * self.targets_before:
            reason = f" ({self._why_not_exactly(over=self.targets_after > budget)})"
        return f"asked {said}, planned {self._in_unit(self.targets_after)}{reason}"

    @property
    def _asked(self) -> tuple[float, str] | None:
        """The bytes of the targets that were asked for, and the request in words; None if the recipe asks for no size."""
        recipe = self.recipe
        if recipe.bits is not None:
            return recipe.bits * sum(step.target.numel for step in self.steps) / 8, f"{recipe.bits:.5g} bits per weight"
        if (limit := recipe.amounts["size"]) is not None:
            return limit - self.header_bytes - (self.whole_after - self.targets_after), f"{readable(limit)} of weight files"
        ratio = recipe.dropping.ratio if recipe.dropping is not None and recipe.compresses_nothing else recipe.ratio
        return None if ratio is None else ((1 - ratio) * self.targets_before, f"ratio {ratio:.5g}")

    def _in_unit(self, nbytes: int) -> str:
        """The size of the model with this many bytes of targets, in the unit of the request."""
        if self.recipe.bits is not None:
            return f"{8 * nbytes / sum(step.target.numel for step in self.steps):.4g}"
        if self.recipe.size is not None:
            return f"at most {readable(self.whole_after - self.targets_after + nbytes + self.header_bytes)}"
        return f"{1 - nbytes / self.targets_before:.4g}"

    def _why_not_exactly(self, over: bool) -> str:
        """Why the plan takes more (`over`) or fewer bytes than were asked for."""
        recipe = self.recipe
        if recipe.bits_of_codes:
            return f"codes of {recipe.bits:g} bits, with their scales and zero points"
        if over:
            return "some targets stay dense, and the ratio holds for each of the others"
        larger = [self._larger(unit) for unit in self.units]
        if recipe.depth is not None and not any(larger):
            return f"{len(self.dropped)} of {self.layers} layers go" if self.dropped else "whole sub-layers go"
        if not any(larger):
            return f"the largest that {recipe.compression[0].name} offers here"
        if recipe.allocation != "uniform":
            return f"what the rule {recipe.allocation} comes to"
        return f"the next larger size is {self._in_unit(self.targets_after + sum(more or 0 for more in larger))}"

    def _larger(self, unit: Unit) -> int | None:
        """How many bytes more the next larger option of a unit takes; None if it has its largest or is dense."""
        names = {target.name for target in unit.targets}
        now = sum(step.bytes_after for step in self.steps if step.target.name in names)
        return next((option.nbytes - now for option in self.options[unit.name] if option.nbytes > now), None)

    @property
    def renumbered(self) -> dict[int, int]:
        """Index in the original model -> index in the result, for every layer that is not dropped."""
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
        """Name of each consecutive stage and the targets' bytes after it; empty if there is only one stage."""
        found, named = [], [step.method for step in self.recipe.steps]  # empty for alternatives, even if these have steps
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
        """Mean stored bits per weight of the targets, including scales, masks and indices."""
        return 8 * self.targets_after / sum(step.target.numel for step in self.steps)

    @property
    def ratio(self) -> float:
        """Removed fraction of the targets' bytes."""
        return 1 - self.targets_after / self.targets_before

    @property
    def expands(self) -> bool:
        """Whether the original takes clearly fewer bytes on the disk than in the dtype of the result (GGUF, fp8)."""
        return 0 < self.file_bytes < 0.95 * self.whole_bytes

    @property
    def whole_after(self) -> int:
        return self.whole_bytes - self.targets_before + self.targets_after - self.dropped_beside

    @property
    def disk_bytes(self) -> int:
        """Most bytes of disk that the weights take during the run: a shard, or those of one large part, are there twice."""
        return self.whole_after + min(self.whole_after, max(self.max_shard_bytes, self.largest_part))

    @property
    def disk_peak(self) -> int:
        """Most bytes of disk that the run takes: the result or what is deleted before it, beside what is kept to the end."""
        before = sum(nbytes for kind, nbytes in self.scratch.items() if kind in DELETED_EARLY)
        return sum(self.scratch.values()) - before + max(before, self.disk_bytes)

    @property
    def collects(self) -> bool:
        """Whether statistics of the original model are on the disk before the first layer is compressed."""
        method = self.recipe.compression[0]
        if self.recipe.dropping is not None:
            return False
        return self.recipe.allocation != "uniform" or method.across_layers or bool(method.all_needs & BACKWARD_NEEDS)

    @property
    def needs_ahead(self) -> dict[str, frozenset[str]]:
        """Statistics of the original model that a run of its own collects for each target before it compresses.

        Where each layer is solved by what the compressed layers before it give, only gradients are the original's.
        """
        recipe = self.recipe
        if recipe.allocation == "uniform" and recipe.propagate == "compressed" and not recipe.compression[0].across_layers:
            return {name: each & BACKWARD_NEEDS for name, each in self.needs.items()}
        return self.needs

    @property
    def whole_ratio(self) -> float:
        """Removed fraction of the whole model's bytes."""
        return 1 - self.whole_after / self.whole_bytes

    def dense_bytes(self, unit: Unit) -> int:
        """Dense bytes of a unit's targets."""
        return sum(target.numel * self.dtype.itemsize for target in unit.targets)

    def layer_steps(self, layer: int) -> list[Step]:
        return [step for step in self.steps if step.target.layer == layer]

    def solved(self, layer: int) -> list[Target]:
        """The targets of a layer that do not stay dense."""
        return [step.target for step in self.layer_steps(layer) if not step.choice.dense]

    @cached_property
    def needs(self) -> dict[str, frozenset[str]]:
        """Target -> the statistics that the method needs if the target does not stay dense.

        Targets outside all units have an entry too, so that recipes can share statistics.
        """
        method = self.recipe.compression[0]
        return {step.target.name: method.needs for step in self.steps} | needs_of(method, self.units)

    def wanted(self, layer: int) -> Wanted:
        """The statistics to collect in a layer, for the targets that do not stay dense."""
        return wanted(self.solved(layer), self.needs)

    def chunks(self, layer: int) -> list[list[Target]]:
        """The solved targets of a layer in chunks whose statistics are collected together; a chunk holds only whole units."""
        units = ([target.name for target in unit.targets] for unit in self.units if len(unit.targets) > 1)
        return chunks_of(self.solved(layer), self.wanted(layer).nbytes, units)

    def identity(self, checkpoint: Mapping[str, str], calibration: Calibration) -> dict[str, Any]:
        """Everything that determines the result of a run; equal identities give equal bytes on the same machine.

        Args:
            checkpoint: the model's own identity (`Checkpoint.identity`).
            calibration: the calibration set; refinements and searches read its held-out tokens too.
        """
        recipe = self.recipe.resolved()
        recipe["calibration"] |= {"tokens": calibration.hash}
        if len(calibration.held_out):
            recipe["calibration"] |= {"held_out_tokens": token_hash(calibration.held_out)}
        identity = {
            "version": IDENTITY,
            "recipe": recipe,
            "model": {"type": self.model["type"], **checkpoint},
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
        }
        # the default is left out: results of an lrc that had one shard a layer are the same request
        return identity if self.max_shard_bytes == SHARD_BYTES else identity | {"max_shard_bytes": self.max_shard_bytes}


class Plan(Planned):
    """The plan that a run executes: every target has its final option."""


class Draft(Planned):
    """A provisional plan from the recipe and the files' headers alone.

    It assumes an even allocation if the allocation needs losses, the last layers if a score chooses the layers to drop, and a
    default ratio if a search finds the size. `planner.make_plan` turns it into the plan.
    """

    def settled(self) -> Plan:
        """This draft as a plan, if nothing remains to be measured."""
        return Plan(**{each.name: getattr(self, each.name) for each in fields(self)})


def short_of_tokens(plan: Planned) -> dict[str, int]:
    """Role -> dimensions of the second moment that its targets are solved by, where the calibration set has fewer tokens.

    A gram of x has as many dimensions as a target has inputs; that of y = W x has at most as many as the smaller side. With
    fewer tokens it is singular, and says nothing about some directions. Experts are left out: how many tokens reach one is
    known only from the text.
    """
    tokens = plan.recipe.calibration.samples * plan.recipe.calibration.length
    found: dict[str, int] = {}
    for step in plan.steps:
        target, needs = step.target, plan.needs.get(step.target.name, frozenset())
        sizes = {"gram": target.in_features, "output_gram": min(target.in_features, target.out_features)}
        widest = max((size for name, size in sizes.items() if name in needs), default=0)
        if not step.choice.dense and target.expert is None and widest > tokens:
            found[target.role] = widest
    return found
