"""The loop over the layers: load the weights, collect statistics, solve, write the shard, compute the next activations.

There are four variants of the loop. `_OneShot` uses the original model's activations, `_Sequential` those of the compressed
model, `_BothModels` both. `_without_activations` uses none: it reads statistics from disk.

A layer that an earlier, killed run finished is not compressed again. It only runs forward, so that the first unfinished layer
receives the same activations as in an uninterrupted run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.collect import Statistics
from ..calibrate.layerwise import run_batches, run_in_chunks, through_layers
from ..compress.base import NOTHING_SEEN, TargetStats
from ..compress.forms.absent import ZERO, Guarded
from ..compress.forms.base import Form, Spec
from ..model.events import Event
from ..model.layer_edit import NONE, edited
from ..model.layer_forms import form_specs, install, stored_tensors, target_weight
from ..model.lockstep import Call, hidden_of
from ..model.machine.host_memory import give_back, peak_rss
from ..model.view import ModelView
from ..plan.plan import Plan, Step
from ..refine.both_models import Pair, restored
from ..refine.objectives import BlockSettings, refine_block
from .run import Run
from .solve import SolvedTarget, UnitSolver


@dataclass(frozen=True)
class TargetRecord:
    """The record of one target in lrc.json.

    Args:
        name: the target's module path.
        form: the spec of its form.
        shape: (out, in) of its weight.
        bytes_before, bytes_after: its size in the original and in the result.
        error: its loss in the method's own metric, relative to the loss of dropping the target; None if it is not compressed.
        tokens: number of tokens in its statistics; None if it is not compressed or the method uses no statistics.
        damping: the ridge that was added to a gram, relative to the gram's mean diagonal.
        note: a remark of the method or the plan.
    """

    name: str
    form: Spec
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    error: float | None = None
    tokens: int | None = None
    damping: float = 0.0
    note: str = ""

    @classmethod
    def of(cls, step: Step, found: SolvedTarget | None, counts_tokens: bool) -> TargetRecord:
        """Make the record of a target.

        Args:
            step: the target's entry in the plan.
            found: its solution; None for a target that is kept dense or pruned.
            counts_tokens: whether the method uses statistics, whose quality depends on the number of tokens.
        """
        target = step.target
        shape = (target.out_features, target.in_features)
        if found is None:
            spec = {"kind": "dense" if step.bytes_after else ZERO}
            return cls(target.name, spec, shape, step.bytes_before, step.bytes_after, note=step.why_dense)
        notes = [found.note] if found.note else []
        if counts_tokens and found.tokens < target.in_features:
            notes.append(f"only {found.tokens} calibration tokens for an input of {target.in_features}")
        return cls(
            target.name,
            found.form.spec(),
            shape,
            step.bytes_before,
            step.bytes_after,
            found.error,
            found.tokens if counts_tokens else None,
            found.damping,
            "; ".join(notes),
        )


@dataclass(frozen=True, kw_only=True)
class LayerDone(Event):
    """A layer is finished: number `done` of `total`.

    Args:
        records: of the layer's targets.
        peak_bytes: the process's peak memory so far.
        resumed: whether an earlier run compressed the layer.
    """

    records: tuple[TargetRecord, ...]
    peak_bytes: int
    resumed: bool = False


@dataclass(frozen=True)
class SolvedLayer:
    """The content of a layer's shard, with its metadata.

    Args:
        specs: module path -> spec of its form, as in config.json.
        tensors: the stored tensors, on the CPU.
        record: the layer's record in the journal.
    """

    specs: dict[str, Spec]
    tensors: dict[str, Tensor]
    record: dict[str, Any]


@torch.no_grad()
def compress_layers(plan: Plan, run: Run, parts: Mapping[str, str], statistics: Statistics | None) -> None:
    """Compress every layer that is not pruned, and write it to the artifact.

    Args:
        plan: the final plan.
        run: the run; its artifact receives the layers.
        parts: layer name -> name of its file.
        statistics: statistics of the original model that are on disk; None if they are collected here. With statistics on disk
            no activations are computed, unless the recipe propagates through compressed layers or refines blocks.

    Raises:
        LrcError: a problem that the user can fix; finished layers are kept.
    """
    work = _Layers(plan, run, parts, statistics)
    if all(name in run.artifact.done for name in work.staying):
        return
    tokens, held_out = (each.split(plan.batch) for each in (run.calibration.tokens, run.calibration.held_out))
    recipe = plan.recipe
    idle = recipe.depth is not None and not any(plan.solved(index) for index in range(len(run.view.layers)))
    if recipe.refine is not None and recipe.refine.block is not None:
        visit = _BothModels(work, recipe.refine.block, len(held_out)).visit
        through_layers(run.view, [*tokens, *held_out] * 2, visit, plan.dropped, plan.model_edit.edit)
    elif recipe.propagate == "compressed" and recipe.reads_text and not idle:
        through_layers(run.view, tokens, _Sequential(work).visit, plan.dropped, plan.model_edit.edit)
    elif recipe.reads_text and not idle and statistics is None:
        through_layers(run.view, tokens, _OneShot(work).visit, plan.dropped, plan.model_edit.edit)
    else:
        _without_activations(work)


class _Layers:
    """Operations on single layers of one run: collect statistics, solve, write and read shards."""

    def __init__(self, plan: Plan, run: Run, parts: Mapping[str, str], statistics: Statistics | None) -> None:
        self.plan, self.run, self.statistics = plan, run, statistics
        self.staying = staying_layers(run.view, plan)
        self._parts = parts
        self._units = {target.name: unit for unit in plan.units for target in unit.targets}
        self._solver = UnitSolver(plan, run.view, run.devices, None if statistics is None else statistics.read)
        self._waiting: dict[str, SolvedTarget] = {}  # targets of later layers, solved with a unit that spans layers

    def finished(self, name: str) -> bool:
        """Whether the layer is in the artifact, written by this run or an earlier one."""
        return name in self.run.artifact.done

    def last(self, index: int) -> bool:
        """Whether this is the last layer."""
        return index == len(self.run.view.layers) - 1

    def forward(self, layer: nn.Module, name: str, calls: Sequence[Call]) -> list[Any]:
        """The layer's outputs, batch by batch."""
        return run_batches(layer, name, calls, self.run.devices)[0]

    def observe_and_solve(
        self, index: int, name: str, layer: nn.Module, calls: Sequence[Call]
    ) -> tuple[list[Any], SolvedLayer]:
        """Run a layer and solve its targets; the statistics of one chunk of targets are in memory at a time.

        Returns:
            One output per call, and the content of the layer's shard.
        """
        found: dict[str, SolvedTarget] = {}

        def take(stats: dict[str, TargetStats]) -> None:
            if self.statistics is not None:
                stats = self.statistics.with_gradients(name, stats)
            self._solve(index, layer, stats, found)

        chunks, what = self.plan.chunks(index), self.plan.wanted(index)
        outputs = run_in_chunks(layer, name, calls, self.run.devices, chunks, what, take)
        return outputs, self.formed(index, name, layer, found)

    def solve_from_disk(self, index: int, name: str, layer: nn.Module) -> SolvedLayer:
        """The content of a layer's shard, solved from statistics on disk, which are read chunk by chunk."""
        found: dict[str, SolvedTarget] = {}
        for chunk in self.plan.chunks(index):
            names = [each.name for each in chunk if each.name not in self._waiting and each.name not in found]
            stats = self.statistics.read(name, names) if self.statistics else dict.fromkeys(names, NOTHING_SEEN)
            self._solve(index, layer, stats, found)
        return self.formed(index, name, layer, found)

    def _solve(self, index: int, layer: nn.Module, stats: dict[str, TargetStats], found: dict[str, SolvedTarget]) -> None:
        """Solve the units of these targets. Add the solutions of this layer's targets, earlier ones included, to `found`.

        Args:
            stats: statistics of some of the layer's targets; those of one unit are passed together. Entries are removed when
                they are used, to free their memory.
            found: target name -> solution.
        """
        ready = [each.name for each in self.plan.solved(index) if each.name in stats]
        open_units = dict.fromkeys(self._units[name] for name in ready if name not in self._waiting and name not in found)
        self._waiting |= self._solver.solve(list(open_units), layer, index, stats)
        for target in self.plan.solved(index):
            if target.name in self._waiting:
                found[target.name] = self._waiting.pop(target.name)

    def formed(self, index: int, name: str, layer: nn.Module, found: Mapping[str, SolvedTarget]) -> SolvedLayer:
        """The content of a layer's shard, from the solutions of its targets."""
        steps = self.plan.layer_steps(index)
        forms: dict[str, Form] = {path: each.form for path, each in found.items()}
        edits = self.plan.model_edit.edit(name) or NONE
        if edits.maps and not forms and not edits.zeroed:
            forms = _guard(self.plan, layer, name, index)
        specs = form_specs((step.target for step in steps), forms)
        records = [
            asdict(TargetRecord.of(step, found.get(step.target.name), bool(self.plan.needs[step.target.name])))
            for step in steps
        ]
        record = {"forms": specs, "edits": edits.specs(name), "targets": records}
        return SolvedLayer(specs, stored_tensors(layer, name, forms), record)

    def write(self, name: str, solved: SolvedLayer) -> None:
        """Write a layer to the artifact, under its number in the result."""
        self.run.artifact.write(name, self._parts[name], renamed(solved.tensors, name, self.staying[name]), solved.record)

    def put_back(self, layer: nn.Module, name: str) -> None:
        """Load a finished layer's forms and other tensors from the artifact into the layer."""
        held = renamed(self.run.artifact.read(name), self.staying[name], name)
        install(layer, name, self.run.artifact.done[name].record["forms"], held)
        restored(layer, name, held)

    def report(self, index: int, name: str, started: float, resumed: bool) -> None:
        """Notify that a layer is finished."""
        records = tuple(TargetRecord(**record) for record in self.run.artifact.done[name].record["targets"])
        self.run.notify(
            LayerDone(
                "layer", index + 1, len(self.run.view.layers), time.perf_counter() - started,
                records=records, peak_bytes=peak_rss(), resumed=resumed,
            )
        )  # fmt: skip


def _without_activations(work: _Layers) -> None:
    """Compress every layer from statistics on disk, or without statistics if the recipe uses no calibration set."""
    view = work.run.view
    for index, name in enumerate(view.layer_names):
        if name not in work.staying:
            continue
        started, resumed = time.perf_counter(), work.finished(name)
        if not resumed:
            with edited(view.load(name), name, work.plan.model_edit.edit(name)) as layer:
                work.write(name, work.solve_from_disk(index, name, layer))
            view.unload(name)
            give_back()
        work.report(index, name, started, resumed)


@dataclass(frozen=True)
class _OneShot:
    """Compress every layer with statistics of the original model's activations."""

    work: _Layers

    def visit(self, index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any] | None:
        """Compress a layer unless it is finished; return the original layer's outputs."""
        work, started, resumed = self.work, time.perf_counter(), self.work.finished(name)
        outputs: list[Any] | None = None
        if not resumed:
            outputs, solved = work.observe_and_solve(index, name, layer, calls)
            work.write(name, solved)
            del solved
        elif not work.last(index):
            outputs = work.forward(layer, name, calls)
        work.report(index, name, started, resumed)
        return outputs


@dataclass(frozen=True)
class _Sequential:
    """Compress every layer with statistics of the activations that the compressed earlier layers produce."""

    work: _Layers

    def visit(self, index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any] | None:
        """Compress a layer, or load it from the artifact if it is finished; return the compressed layer's outputs."""
        work, started, resumed = self.work, time.perf_counter(), self.work.finished(name)
        if resumed:
            work.put_back(layer, name)
        else:
            solved = work.observe_and_solve(index, name, layer, calls)[1]
            work.write(name, solved)
            if not work.last(index):
                install(layer, name, solved.specs, solved.tensors)
            del solved
        outputs = None if work.last(index) else work.forward(layer, name, calls)
        work.report(index, name, started, resumed)
        return outputs


@dataclass(frozen=True)
class _BothModels:
    """Compress and train every layer, with the activations of both the original and the compressed model.

    Args:
        work: the operations on single layers.
        settings: the settings of the training.
        held_out: number of held-out batches at the end of each model's batches; they decide when a layer's training stops.
    """

    work: _Layers
    settings: BlockSettings
    held_out: int

    def visit(self, index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any]:
        """Compress a layer and train it towards the original's outputs, or load it from the artifact if it is finished.

        Returns:
            The outputs of the original layer, followed by those of the compressed layer unless it is the last layer.
        """
        work, started, pair = self.work, time.perf_counter(), Pair.of(calls, self.held_out)
        resumed = work.finished(name)
        if resumed:
            goals, small = work.forward(layer, name, pair.original), copy.deepcopy(layer)
            work.put_back(small, name)
        else:
            goals, small = self._follow(index, name, layer, pair)
        work.report(index, name, started, resumed)
        return goals if work.last(index) else goals + work.forward(small, name, pair.compressed)

    def _follow(self, index: int, name: str, layer: nn.Module, pair: Pair) -> tuple[list[Any], nn.Module]:
        """Compress a copy of a layer, train it towards the original layer's outputs, and write it.

        Returns:
            The original layer's outputs, and the compressed copy.
        """
        work, sequential = self.work, self.work.plan.recipe.propagate == "compressed"
        seen, unseen = pair.read(sequential)
        outputs, solved = work.observe_and_solve(index, name, layer, seen)
        others = work.forward(layer, name, unseen)
        goals = others if sequential else outputs + others
        small = copy.deepcopy(layer)
        install(small, name, solved.specs, solved.tensors)
        done = refine_block(small, *pair.split([hidden_of(goal) for goal in goals]), self.settings)
        trained = {f"{name}.{key}": value for key, value in small.state_dict().items()}
        tensors = {key: trained.get(key, value).to("cpu") for key, value in solved.tensors.items()}
        refinement = {key: value for key, value in asdict(done).items() if key != "seconds"}
        work.write(name, SolvedLayer(solved.specs, tensors, solved.record | {"refinement": refinement}))
        return goals, small


def _guard(plan: Plan, layer: nn.Module, name: str, index: int) -> dict[str, Form]:
    """Store one matrix under another name, so that loading without lrc fails instead of leaving out the layer's linear maps."""
    target = next(step.target for step in plan.layer_steps(index) if step.target.expert is None)
    weight, bias = target_weight(layer, name, target)
    return {target.name: Guarded(weight, bias).stored(plan.dtype)}


def staying_layers(view: ModelView, plan: Plan) -> dict[str, str]:
    """Name of a layer that is not pruned -> its name in the result."""
    return {view.layer_names[old]: view.layer_names[new] for old, new in plan.renumbered.items()}


def renamed(named: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same mapping with the layer name `old` replaced by `new` at the start of its keys."""
    return {new + key.removeprefix(old) if f"{key}.".startswith(old + ".") else key: value for key, value in named.items()}
