"""Repairs: compensating for runs of dropped layers, and keeping only the repairs that do not raise the held-out loss.

A fitted repair is a linear map (depth/repairs/). The original model and the pruned one run layer by layer on the same tokens.
At the end of each run of dropped layers the map is fitted from the pruned model's hidden states to the original's, and applied
to the pruned model's, so that later runs are fitted to the states that will reach them. Where the map can be multiplied into a
matrix it is, and the checkpoint stays plain; else it is a linear layer of its own (compress/forms/stream_map.py).

Every repair is judged, one after the other, by the model's loss on calibration samples that it was not fitted to: a repair that
raises the loss is left out, and the record says so. Trained repairs: depth/trained_repair.py.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.layerwise import TOKENS_PER_BATCH
from ..compress.forms.base import linear_weight
from ..errors import CalibrationError
from ..model.ablation import Ablation, losses
from ..model.events import Event, Notify, silent
from ..model.layer_edit import LayerEdit, LinearMap
from ..model.layerwise import LayerTurn, layerwise
from ..model.lockstep import hidden_of, run_calls, with_hidden
from ..model.sublayers import SubLayer, sublayers_of
from ..model.view import ModelView
from ..refine.trainer import Windows
from .base import Fit, Repair, get_repair
from .cost import HELD_TOKENS, HELD_WINDOW
from .model_edit import ModelEdit
from .repair_record import RepairRecord, RunRecord
from .spec import DepthSpec
from .trained_repair import block_settings, finetune_end, streamline


@dataclass(frozen=True)
class Mend:
    """The repair of one run of dropped layers.

    Args:
        layers: the run: its first layer, and one past its last.
        at: number of the layer that is edited.
        edit: the edit.
        how: which module holds the map, in words.
        tokens: how many tokens it was fitted to.
    """

    layers: tuple[int, int]
    at: int
    edit: LayerEdit
    how: str
    tokens: int


def repaired(
    view: ModelView,
    model_edit: ModelEdit,
    spec: DepthSpec,
    windows: Windows,
    seed: int,
    device: torch.device,
    notify: Notify,
) -> ModelEdit:
    """The same model edit with the repair that the recipe asks for, where it lowers the held-out loss.

    Args:
        windows: calibration samples, and held-out windows; without held-out ones `spec.hold_out` of the samples is held out.
        seed: of training.
        notify: is told of each repaired run of layers, or of each epoch.

    Raises:
        CalibrationError: there is one sample only, and no held-out window.
    """
    if spec.repair == "none":
        return model_edit
    repair = get_repair(spec.repair)
    windows = (
        replace(windows, held_out=held_windows(windows.held_out))
        if len(windows.held_out)
        else divided(windows.train, spec.hold_out)
    )
    if repair.trained:
        train = streamline if repair.on == "layer" else finetune_end
        return train(view, model_edit, windows, block_settings(repair.make(spec.training), seed), device, notify)
    mends = fitted(view, model_edit.dropped, repair, spec.damping, windows.train, device, notify)
    found = accepted(view, model_edit.dropped, mends, windows.held_out, device)
    runs = [RunRecord(list(range(*mend.layers)), mend in found.mends, mend.how, mend.tokens) for mend in mends]
    record = RepairRecord(spec.repair, windows.held_out.numel(), found.loss_without, found.loss, runs)
    edits = {view.layer_names[at]: edit for at, edit in _Merging()(found.mends).items()}
    maps = {name: {path: each.spec for path, each in edit.maps.items()} for name, edit in edits.items() if edit.maps}
    return replace(model_edit, edits=edits, maps=maps, record=record.added_to(model_edit.record))


def divided(tokens: Tensor, hold_out: float) -> Windows:
    """Samples to fit to, and held-out windows of the other samples, which are evenly spread."""
    if len(tokens) < 2:
        raise CalibrationError(
            "A repair needs two calibration samples or more: one is held out.",
            "Raise --samples, or set calibration.held_out.",
        )
    count = min(max(1, round(hold_out * len(tokens))), len(tokens) - 1)
    places = [number * len(tokens) // count for number in range(count)]
    rest = [number for number in range(len(tokens)) if number not in set(places)]
    return Windows(tokens[rest], held_windows(tokens[places]))


def held_windows(samples: Tensor) -> Tensor:
    """Held-out samples (samples, length) cut into windows of `HELD_WINDOW` tokens; evenly spread, `HELD_TOKENS` in all."""
    length = min(HELD_WINDOW, samples.shape[1])
    windows = samples[:, : samples.shape[1] // length * length].reshape(-1, length)
    most = max(1, HELD_TOKENS // length)
    return windows[[number * len(windows) // most for number in range(most)]] if len(windows) > most else windows


def runs_of(dropped: Collection[int]) -> list[tuple[int, int]]:
    """Runs of neighbouring layers, (first, one past the last)."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(dropped):
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs


@dataclass(frozen=True)
class Accepted:
    """The mends that stay in the result, and the held-out loss without any mend and with these, in nats per token."""

    mends: list[Mend]
    loss_without: float
    loss: float


def accepted(view: ModelView, dropped: Collection[int], mends: Sequence[Mend], held: Tensor, device: torch.device) -> Accepted:
    """The mends of which each, added to those before it, does not raise the held-out loss.

    Args:
        held: (windows, length) held-out token ids.
    """
    kept, merge = list(mends), _Merging()
    while True:
        ablations = [Ablation(frozenset(dropped), merge(kept[:count])) for count in range(len(kept) + 1)]
        found = losses(view, held, ablations, device)
        worse = next((count for count in range(1, len(found)) if found[count] > found[count - 1]), None)
        if worse is None:
            return Accepted(kept, found[0], found[-1])
        del kept[worse - 1]


class _Merging:
    """Edits of several mends by layer; equal ones are one object, so that ablations share their computations."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], LayerEdit] = {}

    def __call__(self, mends: Sequence[Mend]) -> dict[int, LayerEdit]:
        found: dict[int, LayerEdit] = {}
        for layer in {mend.at for mend in mends}:
            mine = [mend.edit for mend in mends if mend.at == layer]
            key = tuple(map(id, mine))
            self._known.setdefault(key, mine[0] if len(mine) == 1 else functools.reduce(LayerEdit.with_others, mine))
            found[layer] = self._known[key]
        return found


@dataclass
class _Run:
    """One run while its map is fitted.

    Args:
        first: its first layer.
        end: one past its last.
        sublayer: the last sub-layer of the layer before the run, where the map is applied to that sub-layer's output.
        added: what that sub-layer added to the pruned model's hidden state, one tensor per batch.
        matrix: (weight (out, in), bias) of the sub-layer's last target, where the map can be multiplied into it.
    """

    first: int
    end: int
    sublayer: SubLayer | None = None
    added: list[Tensor] = field(default_factory=list)
    matrix: tuple[Tensor, Tensor | None] | None = None


def fitted(
    view: ModelView,
    dropped: Collection[int],
    repair: Repair,
    damping: float,
    tokens: Tensor,
    device: torch.device,
    notify: Notify = silent,
) -> list[Mend]:
    """The map of every run of dropped layers, in the order of the runs.

    Args:
        tokens: (samples, length); all of them are used.
    """
    return _Fitting(view, dropped, repair, damping, tokens, device).run(notify)


@contextmanager
def _noting_added(layer: nn.Module, run: _Run, sublayer: SubLayer) -> Iterator[None]:
    """While the context is open, note for a run what the last sub-layer before it adds, and the matrix that it ends with."""

    def note(_: nn.Module, __: Any, output: Any) -> None:
        run.added.append(sublayer.scale * hidden_of(output).to("cpu"))

    if sublayer.last is not None:
        module: Any = layer.get_submodule(sublayer.last.role)
        bias = None if module.bias is None else module.bias.to("cpu", copy=True)
        run.matrix = (linear_weight(module).to("cpu", copy=True), bias)
    handle = layer.get_submodule(sublayer.tail).register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


class _Fitting:
    def __init__(
        self,
        view: ModelView,
        dropped: Collection[int],
        repair: Repair,
        damping: float,
        tokens: Tensor,
        device: torch.device,
    ) -> None:
        self._view, self._dropped, self._repair, self._damping = view, frozenset(dropped), repair, damping
        self._tokens, self._device = tokens, device
        self._runs = [_Run(first, end) for first, end in runs_of(dropped)]
        if repair.on == "sub-layer":
            before = [run.first - 1 for run in self._runs if run.first]
            found = sublayers_of(view, view.targets, before) if before else {}
            for run in self._runs:
                if sublayers := found.get(run.first - 1, ()):
                    run.sublayer = sublayers[-1]

    @torch.no_grad()
    def run(self, notify: Notify) -> list[Mend]:
        """One pass over the layers up to the end of the last run."""
        mends, started = list[Mend](), time.perf_counter()
        batches = self._tokens.split(max(1, TOKENS_PER_BATCH // self._tokens.shape[1]))
        last = self._runs[-1].end - 1
        with layerwise(self._view, [*batches, *batches]) as forward:
            for turn in forward:
                whole, pruned = self._outputs(turn)
                ended = next((run for run in self._runs if run.end == turn.index + 1), None)
                if ended:
                    mend, pruned = self._mended(ended, whole, pruned)
                    mends.append(mend)
                    what = f"layers {ended.first} to {ended.end - 1}: {mend.how}"
                    notify(Event(what, seconds=time.perf_counter() - started))
                if turn.index == last:
                    break
                turn.answer([*whole, *pruned])
                del whole, pruned
        return mends

    def _outputs(self, turn: LayerTurn) -> tuple[list[Any], list[Any]]:
        """The layer's outputs in the original model and in the pruned one, per batch."""
        count = len(turn.calls) // 2
        following = next((run for run in self._runs if run.first == turn.index + 1), None)
        skipped = turn.passed_by(turn.calls[count:]) if turn.index in self._dropped else None
        with turn.loaded(self._device) as layer:
            whole = run_calls(layer, turn.name, turn.calls[:count], self._device)
            if skipped is not None:
                return whole, skipped
            if following and following.sublayer:
                with _noting_added(layer, following, following.sublayer):
                    return whole, run_calls(layer, turn.name, turn.calls[count:], self._device)
            if turn.index < self._runs[0].first:
                return whole, whole  # both models are still the same
            return whole, run_calls(layer, turn.name, turn.calls[count:], self._device)

    def _mended(self, run: _Run, whole: Sequence[Any], pruned: Sequence[Any]) -> tuple[Mend, list[Any]]:
        """The run's repair, and the pruned model's outputs with the map applied."""
        width = hidden_of(pruned[0]).shape[-1]
        fit: Fit = self._repair.make(width, self._damping)
        tokens = 0
        for number, (wanted, have) in enumerate(zip(whole, pruned, strict=True)):
            state, goal = (hidden_of(each).flatten(0, -2).to(self._device) for each in (have, wanted))
            if run.added:
                added = run.added[number].reshape(state.shape).to(self._device)
                fit.add(added, goal.double() - state.double() + added.double())
            else:
                fit.add(state, goal)
            tokens += len(state)
        weight, bias = fit.change()
        dtype = self._view.dtype
        narrow = LinearMap(weight.to(dtype), None if bias is None else bias.to(dtype), "input")
        moved = []
        for number, have in enumerate(pruned):
            state = hidden_of(have)
            source = run.added[number].reshape(state.shape) if run.added else state
            step = nn.functional.linear(source.float(), narrow.weight.float(), None if bias is None else bias.float())
            moved.append(with_hidden(have, (state.float() + step).to(state.dtype)))
        run.added.clear()
        at, edit, how = self._placed(run, weight, narrow)
        return Mend((run.first, run.end), at, edit, how, tokens), moved

    def _placed(self, run: _Run, change: Tensor, narrow: LinearMap) -> tuple[int, LayerEdit, str]:
        """Which layer holds the map: (its number, its edit, in words)."""
        names = self._view.layer_names
        if run.sublayer is not None and run.sublayer.last is not None and run.matrix is not None:
            weight, bias = run.matrix
            path = run.sublayer.last.role
            fused = weight.double() + change.cpu() @ weight.double()
            held = self._view.layers[run.first - 1].get_submodule(path)
            tensors = {f"{path}.weight": fused if isinstance(held, nn.Linear) else fused.T}
            if bias is not None:
                tensors[f"{path}.bias"] = bias.double() + change.cpu() @ bias.double()
            narrowed = {key: value.to(self._view.dtype).contiguous() for key, value in tensors.items()}
            return run.first - 1, LayerEdit((), narrowed), f"in the weight of {run.sublayer.last.name}"
        if run.sublayer is not None:
            path = run.sublayer.tail
            behind: Mapping[str, LinearMap] = {path: replace(narrow, side="output")}
            return run.first - 1, LayerEdit(maps=behind), f"a linear layer behind {names[run.first - 1]}.{path}"
        if run.end < len(names):
            return run.end, LayerEdit(maps={"": narrow}), f"a linear layer before {names[run.end]}"
        last = LayerEdit(maps={"": replace(narrow, side="output")})
        return run.first - 1, last, f"a linear layer behind {names[run.first - 1]}"
