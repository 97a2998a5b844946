"""The residual sub-layers of a layer, and which targets belong to each: found by trial, whatever the architecture calls them.

A sub-layer (attention, feed-forward) computes something from the hidden state and adds it to the hidden state. Its tail is the
module whose output is added. The trial: hold the outputs of all other modules fixed and add noise to one module's output. The
module is a tail if the layer's output changes by just that noise (times a constant). The tails found are all sub-layers if the
layer returns its input unchanged when their outputs are zero. A target belongs to the sub-layer whose tail changes when the
target's output is disturbed while the other tails' outputs are held.

Direct children of the layer are tried first, so that a sub-layer is a whole attention or feed-forward with the norm after it;
then all modules with weights of their own. Of layers that are built alike only one is examined.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..checkpoint.streamed import Checkpoint
from ..errors import ModelError
from .layer_edit import LayerEdit, edited
from .lockstep import Call, Lockstep, hidden_of, passed_by, run_layer, with_hidden
from .targets import Target, standing_in

_EQUAL = 1e-3  # relative error; rounding of a layer in float32 is far smaller, the error of a module that is no tail far larger


@dataclass(frozen=True)
class SubLayer:
    """One residual sub-layer.

    Args:
        layer: its number.
        name: path of the module that holds its targets ('model.layers.3.self_attn'), or its tail's.
        targets: its matrices, in the order of a forward.
        tail: path in the layer of the module whose output is added to the hidden state.
        scale: the constant that the output is multiplied by before it is added.
        last: the target whose output is the tail's, where there is one.
        vanishes: whether the tail gives zeros when all targets give zeros.
    """

    layer: int
    name: str
    targets: tuple[Target, ...]
    tail: str
    scale: float
    last: Target | None
    vanishes: bool

    @property
    def zeroed(self) -> LayerEdit:
        """The edit that removes the sub-layer."""
        return LayerEdit(self.targets)


def sublayers_of(
    view: Checkpoint, targets: Sequence[Target], layers: Sequence[int] | None = None
) -> dict[int, tuple[SubLayer, ...]]:
    """Layer -> its sub-layers in the order of a forward; empty where they cannot be told apart.

    Reads the weights of one layer of each kind.

    Args:
        targets: of all layers, in the order of a forward.
        layers: those to examine; None takes all.
    """
    found: dict[int, tuple[SubLayer, ...]] = {}
    alike: dict[Any, tuple[SubLayer, ...]] = {}
    wanted = range(len(view.layers)) if layers is None else sorted(layers)
    inside = {index: list(each) for index, each in groupby(targets, lambda target: target.layer)}
    with torch.no_grad(), standing_in(view) as start, Lockstep(view.model, view.layers) as steps:
        steps.start([start])
        while steps.index <= max(wanted, default=-1):
            index, name, call = steps.index, view.layer_names[steps.index], steps.calls[0]
            output = passed_by(view.layers[index], call)
            mine = inside.get(index, [])
            kind = (type(view.layers[index]), tuple((t.role, t.out_features, t.in_features, t.expert) for t in mine))
            if index in wanted and kind not in alike:
                view.load(name)
                try:
                    alike[kind] = _look(view.layers[index], name, index, mine, call)
                finally:
                    view.unload(name)
            if index in wanted:
                found[index] = tuple(_moved(sublayer, index, name, mine) for sublayer in alike[kind])
            if index == len(view.layers) - 1:
                break
            steps.answer([output])
    return found


def require_sublayers(view: Checkpoint, targets: Sequence[Target]) -> list[SubLayer]:
    """All sub-layers of all layers, numbered by their place in the list.

    Raises:
        ModelError: a layer's sub-layers cannot be told apart, or zeroing a sub-layer's matrices does not remove it.
    """
    everything: list[SubLayer] = []
    for index, sublayers in sublayers_of(view, targets).items():
        name = view.layer_names[index]
        if not sublayers:
            raise ModelError(
                f"{name}: {type(view.layers[index]).__name__} is no sum of its input and residual sub-layers, or one of its "
                "matrices belongs to several.",
                "Use depth.granularity: layer.",
            )
        if stays := [sublayer.name for sublayer in sublayers if not sublayer.vanishes]:
            raise ModelError(
                f"{stays[0]} adds something even where all its matrices give zeros (a bias or norm behind them).",
                "Use depth.granularity: layer.",
            )
        everything += sublayers
    return everything


def _moved(sublayer: SubLayer, index: int, name: str, targets: Sequence[Target]) -> SubLayer:
    """The same sub-layer of another layer that is built alike."""
    if sublayer.layer == index:
        return sublayer
    mine = {(target.role, target.expert): target for target in targets}
    last = None if sublayer.last is None else mine[sublayer.last.role, sublayer.last.expert]
    members = tuple(mine[target.role, target.expert] for target in sublayer.targets)
    return SubLayer(
        index, f"{name}.{_inside(members, sublayer.tail)}", members, sublayer.tail, sublayer.scale, last, sublayer.vanishes
    )


def _inside(targets: Sequence[Target], tail: str) -> str:
    """The path in the layer of the innermost module that holds all targets; the tail's where that is the layer itself."""
    paths = [target.role.split(".") for target in targets]
    common = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
    if len(common) == len(paths[0]):
        common = common[:-1]
    return ".".join(common) or tail


def _look(layer: nn.Module, name: str, index: int, targets: Sequence[Target], call: Call) -> tuple[SubLayer, ...]:
    alone = copy.deepcopy(layer).float()
    alone.__dict__.pop("forward", None)  # the one that Lockstep has put on the instance
    width = call.hidden.shape[-1]
    hidden = torch.randn(1, call.hidden.shape[1], width, generator=torch.Generator().manual_seed(0))
    wide = tree_map(
        lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, (call.args, dict(call.kwargs))
    )
    asked = Call(*with_hidden(wide, hidden))
    children = [path for path, child in alone.named_children() if any(True for _ in child.parameters())]
    leaves = [path for path, m in alone.named_modules() if path and any(True for _ in m.parameters(recurse=False))]
    # The structure does not depend on the weights: where zeros or outliers hide it, other weights show it.
    for shown in (alone, _with_other_weights(alone)):
        for candidates in (children, leaves):
            trial = _Trial(shown, asked, candidates)
            tails = trial.tails()
            if tails and trial.gives_back(tails):
                own = trial if shown is alone else _Trial(alone, asked, candidates)
                found = _assigned(trial, own, tails, name, index, targets)
                if found:
                    return found
    return ()


def _with_other_weights(layer: nn.Module) -> nn.Module:
    """A copy of a layer with random weights of a usual size."""
    other, chance = copy.deepcopy(layer), torch.Generator().manual_seed(2)
    for path, parameter in other.named_parameters():
        random = torch.randn(parameter.shape, generator=chance)
        if parameter.ndim > 1:
            parameter.copy_(random / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(0.1 * random + float(path.endswith("weight")))
    return other


def _assigned(
    trial: _Trial, own: _Trial, tails: dict[str, float], name: str, index: int, targets: Sequence[Target]
) -> tuple[SubLayer, ...]:
    """The sub-layers with their targets; empty where a target belongs to none or to several.

    Args:
        trial: tells what belongs together.
        own: the layer with its own weights, which tells whether a sub-layer without targets adds something.
    """
    members: dict[str, list[Target]] = {tail: [] for tail in tails}
    last: dict[str, Target] = {}
    for target in targets:
        path = target.module.removeprefix(name + ".")
        reached = trial.reached(path, tails)
        if len(reached) != 1:
            return ()
        tail, same = next(iter(reached.items()))
        members[tail].append(target)
        if same and target.expert is None:
            last[tail] = target
    if not all(members.values()):
        return ()
    found = []
    for tail, mine in sorted(members.items(), key=lambda item: targets.index(item[1][0])):
        vanishes = own.vanishes(tail, name, LayerEdit(tuple(mine)))
        found.append(SubLayer(index, f"{name}.{_inside(mine, tail)}", tuple(mine), tail, tails[tail], last.get(tail), vanishes))
    return tuple(found)


class _Trial:
    """One layer on one call, with outputs of its modules held or changed."""

    def __init__(self, layer: nn.Module, call: Call, candidates: Sequence[str]) -> None:
        self._layer, self._call = layer, call
        self._chance = torch.Generator().manual_seed(1)
        self._held: dict[str, Tensor] = {}
        with self._noting(candidates) as noted:
            self._output = hidden_of(run_layer(layer, call))
        size = call.hidden.numel()
        self._held = {path: y for path, y in noted.items() if y.numel() == size and y.shape[-1] == call.hidden.shape[-1]}

    def tails(self) -> dict[str, float]:
        """The candidates whose output is added to the stream as it is, times a constant -> the constant."""
        found = {}
        for path, output in self._held.items():
            added = self._noise(output)
            moved = self._run({each: y + added if each == path else y for each, y in self._held.items()}) - self._output
            added = added.reshape(moved.shape)
            scale = float((moved * added).sum() / added.square().sum())
            if abs(scale) > _EQUAL and _close(moved, scale * added):
                found[path] = scale
        return found

    def gives_back(self, tails: dict[str, float]) -> bool:
        """Whether the layer gives back its input where these put out zeros."""
        return _close(self._run({path: torch.zeros_like(self._held[path]) for path in tails}), self._call.hidden)

    def reached(self, path: str, tails: dict[str, float]) -> dict[str, bool]:
        """The tails that change when a module's output does, all tails' outputs held -> whether by just as much."""
        module = self._layer.get_submodule(path)
        if path in tails:
            return {path: True}
        added: list[Tensor] = []

        def disturb(_: nn.Module, __: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            added.append(self._noise(hidden))
            return with_hidden(output, hidden + added[-1])

        handle = module.register_forward_hook(disturb)
        try:
            with self._noting(list(tails), hold=True) as noted:
                run_layer(self._layer, self._call)
        finally:
            handle.remove()
        moved = {tail: noted[tail] - self._held[tail] for tail in tails if tail in noted}
        return {
            tail: len(added) == 1 and change.numel() == added[0].numel() and _close(change, added[0].reshape(change.shape))
            for tail, change in moved.items()
            if change.norm() > 1e-6 * self._held[tail].norm()
        }

    def vanishes(self, tail: str, name: str, edit: LayerEdit) -> bool:
        """Whether the tail puts out zeros under the edit."""
        with edited(self._layer, name, edit), self._noting([tail]) as noted:
            run_layer(self._layer, self._call)
        return bool((noted[tail] == 0).all())

    def _noise(self, like: Tensor) -> Tensor:
        size = float(like.std()) or 1.0
        return size * torch.randn(like.shape, generator=self._chance)

    def _run(self, outputs: dict[str, Tensor]) -> Tensor:
        """The layer's output where these modules put out these values."""

        def give(value: Tensor) -> Any:
            return lambda module, args, output: with_hidden(output, value)

        handles = [self._layer.get_submodule(path).register_forward_hook(give(value)) for path, value in outputs.items()]
        try:
            return hidden_of(run_layer(self._layer, self._call))
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _noting(self, paths: Sequence[str], hold: bool = False) -> Iterator[dict[str, Tensor]]:
        """What these modules put out; with `hold` the layer goes on with what they put out undisturbed."""
        noted: dict[str, Tensor] = {}

        def note(path: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                noted[path] = hidden_of(output)
                return with_hidden(output, self._held[path]) if hold else None

            return hook

        handles = [self._layer.get_submodule(path).register_forward_hook(note(path)) for path in paths]
        try:
            yield noted
        finally:
            for handle in handles:
                handle.remove()


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= _EQUAL * wanted.norm())
