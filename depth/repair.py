"""Repairs: making up for runs of dropped layers, and keeping only what helps.

A fitted repair is a linear map (depth/repairs/*.py says which). The original model and the pruned one go through the layers
side by side, two streams of the same tokens; at the end of each run the map is fitted from the pruned stream to the original
one, and the pruned stream goes on repaired, so that later runs are fitted to what will reach them. Where the map can be
multiplied into a matrix it is, and the checkpoint stays plain; else it is laid around a layer (compress/forms/stream_map.py).

Every repair is judged by the model's own loss on calibration samples that it was not fitted to, one after the other: what
raises it is left out, and the record says so. Trained repairs: depth/trained_repair.py.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.layerwise import TOKENS_PER_BATCH
from ..compress.forms.base import linear_weight
from ..errors import CalibrationError
from ..model.ablation import Variant, losses
from ..model.host_memory import give_back
from ..model.layer_edit import LayerEdit, LinearMap
from ..model.lockstep import Call, Lockstep, check_finite, hidden_of, on_host, passed_by, run_layer, with_hidden
from ..model.sublayers import SubLayer, sublayers_of
from ..model.view import ModelView
from .base import Fit, Repair, get_repair
from .cost import HELD_TOKENS, HELD_WINDOW
from .model_edit import ModelEdit
from .spec import DepthSpec
from .trained_repair import finetune_end, streamline

Notify = Callable[[str, int, float], None]


@dataclass(frozen=True)
class Mend:
    """One run's repair.

    Args:
        layers: the run, first and one past the last.
        at: the layer that is edited.
        edit: how.
        how: where the map lives, in words.
        tokens: that it was fitted to.
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
    tokens: Tensor,
    apart: Tensor,
    seed: int,
    device: torch.device,
    notify: Notify,
) -> ModelEdit:
    """The same model edit with the repair that the recipe asks for, as far as it helps.

    Args:
        tokens: (samples, length) calibration tokens.
        apart: (windows, length) held-out ones, which decide what is kept; where there are none, `hold_out` of the tokens do.
        seed: of training.
        notify: called with (what was done, how many, seconds).

    Raises:
        CalibrationError: one sample, which cannot be divided.
    """
    if spec.repair == "none":
        return model_edit
    repair = get_repair(spec.repair)
    train, held = (tokens, held_windows(apart)) if len(apart) else divided(tokens, spec.hold_out)
    if repair.on == "layer":
        return streamline(view, model_edit, repair.make(spec.training), train, held, seed, device, notify)
    if repair.on == "end":
        return finetune_end(view, model_edit, repair.make(spec.training), train, held, seed, device, notify)
    mends = fitted(view, model_edit.dropped, repair, spec.damping, train, device, notify)
    kept, before, after = accepted(view, model_edit.dropped, mends, held, device)
    runs = [
        {"layers": list(range(*mend.layers)), "accepted": mend in kept, "where": mend.how, "tokens": mend.tokens}
        for mend in mends
    ]
    record = {"repair": spec.repair, "held_out_tokens": held.numel(), "loss_without": before, "loss": after, "runs": runs}
    edits = {view.layer_names[at]: edit for at, edit in _merged(kept).items()}
    maps = {name: {path: each.spec for path, each in edit.maps.items()} for name, edit in edits.items() if edit.maps}
    return replace(model_edit, edits=edits, maps=maps, record={**model_edit.record, "repair": record})


def divided(tokens: Tensor, hold_out: float) -> tuple[Tensor, Tensor]:
    """(samples to fit to, held-out windows); held-out samples are evenly spread."""
    if len(tokens) < 2:
        raise CalibrationError(
            "A repair needs two calibration samples or more: one is held out.",
            "Raise --samples, or set calibration.held_out.",
        )
    count = min(max(1, round(hold_out * len(tokens))), len(tokens) - 1)
    places = [number * len(tokens) // count for number in range(count)]
    rest = [number for number in range(len(tokens)) if number not in set(places)]
    return tokens[rest], held_windows(tokens[places])


def held_windows(samples: Tensor) -> Tensor:
    """Held-out samples cut into windows of `HELD_WINDOW`; evenly spread, as many as hold `HELD_TOKENS`."""
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


def accepted(
    view: ModelView, dropped: Collection[int], mends: Sequence[Mend], held: Tensor, device: torch.device
) -> tuple[list[Mend], float, float]:
    """(the mends of which each, added to those before it, does not raise the held-out loss; the loss without any; with all)."""
    kept, merge = list(mends), _Merging()
    while True:
        variants = [Variant(frozenset(dropped), merge(kept[:count])) for count in range(len(kept) + 1)]
        found = losses(view, held, variants, device)
        worse = next((count for count in range(1, len(found)) if found[count] > found[count - 1]), None)
        if worse is None:
            return kept, found[0], found[-1]
        del kept[worse - 1]


class _Merging:
    """Edits of several mends by layer; equal ones are one object, so that variants share what they can."""

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


def _merged(mends: Sequence[Mend]) -> dict[int, LayerEdit]:
    return _Merging()(mends)


@dataclass
class _Run:
    """One run while its map is fitted.

    Args:
        sublayer: the last sub-layer of the layer before the run, where the map goes behind it.
        added: what that sub-layer added to the pruned stream, one tensor per batch.
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
    notify: Notify = lambda what, count, seconds: None,
) -> list[Mend]:
    """The map of every run of dropped layers, in their order.

    Args:
        tokens: (samples, length); all of them are used.
    """
    return _Fitting(view, dropped, repair, damping, tokens, device).run(notify)


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
        view, mends, started = self._view, list[Mend](), time.perf_counter()
        batches = self._tokens.split(max(1, TOKENS_PER_BATCH // self._tokens.shape[1]))
        count, last = len(batches), self._runs[-1].end - 1
        view.load_outside()
        with Lockstep(view.model, view.layers) as steps:
            steps.start([{"input_ids": ids} for _ in range(2) for ids in batches])
            view.unload()
            give_back()
            for index, name in enumerate(view.layer_names[: last + 1]):
                template = passed_by(view.layers[index], steps.calls[0])
                layer = view.load(name).to(self._device)
                following = next((run for run in self._runs if run.first == index + 1), None)
                ended = next((run for run in self._runs if run.end == index + 1), None)
                whole = self._through(layer, name, steps.calls[:count])
                if index in self._dropped:
                    pruned = [with_hidden(template, call.hidden) for call in steps.calls[count:]]
                elif index < self._runs[0].first and not (following and following.sublayer):
                    pruned = whole  # the streams have not parted yet
                else:
                    pruned = self._through(layer, name, steps.calls[count:], following)
                view.unload(name)
                give_back()
                if ended:
                    mend, pruned = self._mended(ended, whole, pruned)
                    mends.append(mend)
                    notify(f"layers {ended.first} to {ended.end - 1}: {mend.how}", 0, time.perf_counter() - started)
                if index < last:
                    steps.answer([*whole, *pruned])
                del whole, pruned
        return mends

    def _through(self, layer: nn.Module, name: str, calls: Sequence[Call], following: _Run | None = None) -> list[Any]:
        """The layer's outputs; what its last sub-layer adds is kept for the run that follows."""
        handle = None
        if following and following.sublayer:
            sublayer = following.sublayer
            tail = layer.get_submodule(sublayer.tail)

            def keep(_: nn.Module, __: Any, output: Any) -> None:
                following.added.append(sublayer.scale * hidden_of(output).to("cpu"))

            handle = tail.register_forward_hook(keep)
            if sublayer.last is not None:
                module: Any = layer.get_submodule(sublayer.last.role)
                bias = None if module.bias is None else module.bias.to("cpu", copy=True)
                following.matrix = (linear_weight(module).to("cpu", copy=True), bias)
        outputs = []
        try:
            for batch, call in enumerate(calls):
                output = run_layer(layer, call.to(self._device))
                check_finite(output, name, batch)
                outputs.append(on_host(output))
        finally:
            if handle is not None:
                handle.remove()
        return outputs

    def _mended(self, run: _Run, whole: Sequence[Any], pruned: Sequence[Any]) -> tuple[Mend, list[Any]]:
        """The run's repair, and the pruned stream with it."""
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
        """Where the map lives: (layer, edit, in words)."""
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
