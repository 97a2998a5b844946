"""The loop over the layers: weights in, statistics, solve, shard out, activations on.

A layer that an earlier, killed run finished is not compressed again: it is replayed (forward only), so that the activations
that reach the first unfinished layer are the very same.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.collect import Statistics
from ..calibrate.data import Calibration
from ..calibrate.layerwise import Visit, run_batches, through_layers
from ..checkpoint.artifact import Artifact
from ..compress.base import NOTHING_SEEN, TargetStats
from ..compress.forms.absent import ZERO, Guarded
from ..compress.forms.base import Form, Spec
from ..model.host_memory import give_back, peak_rss
from ..model.layer_edit import NONE, edited
from ..model.layer_forms import form_specs, install, stored_tensors, target_weight
from ..model.lockstep import Call, hidden_of
from ..model.view import ModelView
from ..plan.plan import Plan, Step
from ..refine.correction import Pair, Solved, correct, restored
from ..refine.objectives import refine_block
from .solve import SolvedTarget, solved_forms


@dataclass(frozen=True)
class TargetRecord:
    """What became of one target; kept in lrc.json.

    Args:
        error: the loss in the method's own metric, relative to dropping the target altogether.
        tokens: how many tokens its statistics are over.
        damping: the ridge that was added to a gram, relative to its mean diagonal.
        note: anything a reader should know.
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
        """Of a target that was solved, or (None) of one that stays dense or leaves.

        Args:
            counts_tokens: whether the method works from statistics, so that their tokens say how good they are.
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


@dataclass(frozen=True)
class LayerReport:
    """One finished layer, for whoever watches."""

    index: int
    layers: int
    records: tuple[TargetRecord, ...]
    seconds: float
    peak_bytes: int
    resumed: bool = False


class LayerLoop:
    """Compresses the layers of one run, one after the other, into the artifact; call `run` once, without gradients.

    Args:
        plan: from `make_plan(view, recipe)`.
        view: the model; its weights come and go.
        calibration: tokens (samples, length), and those that are held out.
        artifact: open; what is finished in it is not done again.
        shards: layer name -> the file that it is written to.
        devices: where layers run; targets are solved on the first.
        statistics: of the original model, where they were collected before.
        notify: called after each layer.
    """

    def __init__(
        self,
        plan: Plan,
        view: ModelView,
        calibration: Calibration,
        artifact: Artifact,
        shards: Mapping[str, str],
        devices: Sequence[torch.device],
        statistics: Statistics | None,
        notify: Callable[[LayerReport], None],
    ) -> None:
        self._plan, self._view, self._artifact, self._shards = plan, view, artifact, shards
        self._devices, self._statistics, self._notify = devices, statistics, notify
        self._staying = staying_layers(view, plan)
        self._tokens, self._apart = calibration.tokens.split(plan.batch), calibration.held_out.split(plan.batch)
        self._sequential = plan.recipe.propagate == "compressed"
        self._block = None if plan.recipe.refine is None else plan.recipe.refine.block
        self._units = {target.name: unit for unit in plan.units for target in unit.targets}
        self._waiting: dict[str, SolvedTarget] = {}  # of sets across layers, until their layer comes

    def run(self) -> None:
        """Leave every layer that stays in the artifact.

        Raises:
            LrcError: anything that the user can mend; what is finished stays.
        """
        if all(name in self._artifact.done for name in self._staying):
            return
        plan = self._plan
        idle = plan.recipe.depth is not None and not any(plan.solved(index) for index in range(len(self._view.layers)))
        if self._block is not None or plan.recipe.correction is not None:
            self._through([*self._tokens, *self._apart] * 2, self._visit_both)
        elif plan.recipe.reads_text and not idle and (self._statistics is None or self._sequential):
            self._through(self._tokens, self._visit)
        else:
            self._each_alone()

    def _through(self, tokens: Sequence[Tensor], visit: Visit) -> None:
        through_layers(self._view, tokens, visit, self._plan.dropped, self._plan.model_edit.edit)

    def _each_alone(self) -> None:
        """Compress the layers with no activations between them, from statistics that lie on disk or from none."""
        for index, name in enumerate(self._view.layer_names):
            if name not in self._staying:
                continue
            started = time.perf_counter()
            resumed = name in self._artifact.done
            if not resumed:
                names = [target.name for target in self._plan.solved(index) if target.name not in self._waiting]
                stats = self._statistics.read(name, names) if self._statistics else dict.fromkeys(names, NOTHING_SEEN)
                with edited(self._view.load(name), name, self._plan.model_edit.edit(name)) as layer:
                    self._finish(index, name, layer, stats)
                self._view.unload(name)
                give_back()
            self._report(index, name, started, resumed)

    def _visit(self, index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any] | None:
        """Compress a layer, or answer for one that is finished."""
        started = time.perf_counter()
        last, resumed = self._last(index), name in self._artifact.done
        outputs: list[Any] | None = None
        if resumed:
            if self._sequential:
                self._put_back(layer, name)
            outputs = None if last else run_batches(layer, name, calls, self._devices)[0]
        else:
            outputs, stats = self._observe(index, name, layer, calls)
            specs, stored, _ = self._finish(index, name, layer, stats)
            if self._sequential and not last:
                install(layer, name, specs, stored)
                del stored
                outputs = run_batches(layer, name, calls, self._devices)[0]
        self._report(index, name, started, resumed)
        return outputs

    def _visit_both(self, index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any]:
        """The same with the original's activations beside those of the compressed model."""
        started, pair = time.perf_counter(), Pair.of(calls, len(self._apart))
        resumed = name in self._artifact.done
        if resumed:
            goals, small = run_batches(layer, name, pair.original, self._devices)[0], copy.deepcopy(layer)
            self._put_back(small, name)
        else:
            goals, small = self._follow(index, name, layer, pair)
        self._report(index, name, started, resumed)
        return goals if self._last(index) else goals + run_batches(small, name, pair.compressed, self._devices)[0]

    def _follow(self, index: int, name: str, layer: nn.Module, pair: Pair) -> tuple[list[Any], nn.Module]:
        """The original layer's outputs, and a compressed copy of it that was held to them and written."""
        seen, unseen = pair.read(self._sequential)
        outputs, stats = self._observe(index, name, layer, seen)
        others = run_batches(layer, name, unseen, self._devices)[0]
        goals = others if self._sequential else outputs + others

        def in_place(tried: nn.Module) -> Solved:
            solved = self._compress(index, name, tried, dict(stats))
            install(tried, name, *solved[:2])
            return solved

        targets = [step.target for step in self._plan.layer_steps(index)]
        wanted = [hidden_of(goal) for goal in goals]
        small, (_, stored, record) = correct(layer, name, targets, pair, wanted, self._plan.recipe.correction, in_place)
        if self._block is not None:
            done = refine_block(small, *pair.split(wanted), self._block)
            trained = {f"{name}.{key}": value for key, value in small.state_dict().items()}
            stored = {key: trained.get(key, value).to("cpu") for key, value in stored.items()}
            record |= {"refinement": {key: value for key, value in asdict(done).items() if key != "seconds"}}
        self._write(name, stored, record)
        return goals, small

    def _observe(
        self, index: int, name: str, layer: nn.Module, calls: Sequence[Call]
    ) -> tuple[list[Any], dict[str, TargetStats]]:
        """A layer's outputs, and the statistics of its targets that are not left dense."""
        plan = self._plan
        outputs, stats = run_batches(layer, name, calls, self._devices, plan.solved(index), plan.wanted(index))
        if self._statistics is not None:
            stats = self._statistics.with_gradients(name, stats)
        return outputs, stats

    def _finish(self, index: int, name: str, layer: nn.Module, stats: dict[str, TargetStats]) -> Solved:
        solved = self._compress(index, name, layer, stats)
        self._write(name, *solved[1:])
        return solved

    def _compress(self, index: int, name: str, layer: nn.Module, stats: dict[str, TargetStats]) -> Solved:
        """What the artifact will hold of a layer, which itself is not changed; statistics are used up."""
        steps = self._plan.layer_steps(index)
        forms, records = self._solve(index, layer, steps, stats)
        edits = self._plan.model_edit.edit(name) or NONE
        if edits.maps and not forms and not edits.zeroed:
            forms = _guard(self._plan, layer, name, index)
        specs = form_specs((step.target for step in steps), forms)
        record = {"forms": specs, "edits": edits.specs(name), "targets": [asdict(each) for each in records]}
        return specs, stored_tensors(layer, name, forms), record

    def _solve(
        self, index: int, layer: nn.Module, steps: Sequence[Step], stats: dict[str, TargetStats]
    ) -> tuple[dict[str, Form], list[TargetRecord]]:
        """Forms and records of a layer's targets; what is found for sets that reach into later layers waits for them."""
        read = None if self._statistics is None else self._statistics.read
        forms: dict[str, Form] = {}
        records = []
        for step in steps:
            found, name = None, step.target.name
            if not step.choice.dense:
                if name not in self._waiting:
                    self._waiting |= solved_forms(
                        self._plan, self._view, self._units[name], layer, index, stats, read, self._devices[0]
                    )
                found = self._waiting.pop(name)
                forms[name] = found.form
            records.append(TargetRecord.of(step, found, bool(self._plan.needs[name])))
        return forms, records

    def _write(self, name: str, stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        self._artifact.write(name, self._shards[name], renamed(stored, name, self._staying[name]), record)

    def _put_back(self, layer: nn.Module, name: str) -> None:
        """Give a layer the forms, and all else that was stored of it, by the run that finished it."""
        held = renamed(self._artifact.read(name), self._staying[name], name)
        install(layer, name, self._artifact.done[name].record["forms"], held)
        restored(layer, name, held)

    def _report(self, index: int, name: str, started: float, resumed: bool) -> None:
        records = tuple(TargetRecord(**record) for record in self._artifact.done[name].record["targets"])
        self._notify(LayerReport(index, len(self._view.layers), records, time.perf_counter() - started, peak_rss(), resumed))

    def _last(self, index: int) -> bool:
        return index == len(self._view.layers) - 1


def _guard(plan: Plan, layer: nn.Module, name: str, index: int) -> dict[str, Form]:
    """One matrix under another name, so that a reader without lrc does not run the layer without its maps."""
    target = next(step.target for step in plan.layer_steps(index) if step.target.expert is None)
    weight, bias = target_weight(layer, name, target)
    return {target.name: Guarded(weight, bias).stored(plan.dtype)}


def staying_layers(view: ModelView, plan: Plan) -> dict[str, str]:
    """Layer of the original -> its name in the result."""
    return {view.layer_names[old]: view.layer_names[new] for old, new in plan.renumbered.items()}


def renamed(named: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same values with one layer's prefix exchanged for another's."""
    return {new + key.removeprefix(old) if f"{key}.".startswith(old + ".") else key: value for key, value in named.items()}
