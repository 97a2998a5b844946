"""A forward of the whole model over many batches, with the weights of one layer in memory at a time.

    with layerwise(view, batches) as forward, torch.no_grad():
        for turn in forward:
            with turn.loaded(device) as layer:
                turn.answer(run_calls(layer, turn.name, turn.calls, device))
        for result in forward.results():
            ...

Each batch waits before a layer until all batches have reached it (`Lockstep`). The caller computes that layer's outputs in
whatever way it needs: with statistics, with a form in place of a weight, for a few calls only. It may stop at any layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.architecture import without_head
from ..checkpoint.streamed import Checkpoint
from ..compress.forms.shared import lenders
from .layer_edit import LayerEdit, edited
from .lockstep import Call, Lockstep, passed_by, run_calls, with_hidden
from .machine.host_memory import give_back

_CPU = torch.device("cpu")


@contextmanager
def layerwise(
    view: Checkpoint, batches: Sequence[Tensor], options: Mapping[str, Any] | None = None, head: bool = True
) -> Iterator[LayerwiseForward]:
    """Run every batch up to the first layer; while the context is open, the rest of the forward can be run.

    Args:
        view: the model. Its weights outside the layers are in memory only before the first layer and for `results`.
        batches: token ids, (samples, length) int64 each.
        options: more arguments of the model's forward, the same for every batch.
        head: whether the whole model runs; else its decoder alone, whose results are hidden states and no logits.

    Raises:
        CheckpointError, NonFiniteError: as for `Checkpoint.load`.
    """
    model = view.model if head else without_head(view.model)
    view.load_outside()
    with Lockstep(model, view.layers) as steps:
        steps.start([{"input_ids": ids, **(options or {})} for ids in batches])
        view.unload()
        give_back()
        try:
            yield LayerwiseForward(view, steps)
        finally:
            view.unload()


@contextmanager
def in_memory(view: Checkpoint, name: str) -> Iterator[nn.Module]:
    """While the context is open, the weights of a layer are in memory, and those that it borrows from other layers.

    Args:
        view: the model.
        name: module path of the layer.

    Raises:
        CheckpointError, NonFiniteError: as for `Checkpoint.load`.
    """
    layer = view.load(name)
    lent = lenders(layer, name)
    for path in lent:
        view.load_module(path)
    try:
        yield layer
    finally:
        for path in (name, *lent):
            view.unload(path)
        give_back()


@torch.no_grad()
def logits(view: Checkpoint, ids: Tensor) -> Tensor:
    """The model's logits (samples, length, vocabulary) for token ids (samples, length), layer by layer on the CPU.

    Raises:
        CheckpointError, NonFiniteError: as for `Checkpoint.load`.
    """
    with layerwise(view, [ids]) as forward:
        for turn in forward:
            with turn.loaded() as layer:
                turn.answer(run_calls(layer, turn.name, turn.calls, _CPU))
        found: Tensor = next(forward.results()).logits
    return found


class LayerwiseForward:
    """Forwards of all batches, layer after layer: iterate once over the turns, then ask for the results; see `layerwise`."""

    def __init__(self, view: Checkpoint, steps: Lockstep) -> None:
        self._view, self._steps = view, steps
        self._outputs: Sequence[Any] | None = None  # of the layer whose turn it is

    def __iter__(self) -> Iterator[LayerTurn]:
        """One turn per layer, in order. Every turn but the last must be answered before the next one is asked for."""
        last = len(self._view.layers) - 1
        for index in range(last + 1):
            yield LayerTurn(self, index)
            if index < last:
                self._steps.answer(self._taken())

    @property
    def calls(self) -> list[Call]:
        """What each batch passes to the layer that all batches wait before."""
        return self._steps.calls

    def results(self) -> Iterator[Any]:
        """What the model returns for each batch, made one at a time after the last layer's answer.

        The weights after the last layer (final norm, head) are in memory on the CPU from this call to the end of the context.
        """
        self._view.load_end()
        return self._steps.finish(self._taken())

    def _taken(self) -> Sequence[Any]:
        outputs, self._outputs = self._outputs, None
        assert outputs is not None, "a layer's turn ended without an answer"
        return outputs


class LayerTurn:
    """One layer, which all batches wait before.

    Attributes:
        index: its number.
        name: its module path.
    """

    def __init__(self, forward: LayerwiseForward, index: int) -> None:
        self._forward, self._view = forward, forward._view
        self.index, self.name = index, self._view.layer_names[index]

    @property
    def calls(self) -> list[Call]:
        """What each batch passes to the layer; freed when the turn ends, so keep none of them longer than needed."""
        return self._forward.calls

    @contextmanager
    def loaded(self, device: torch.device = _CPU, edit: LayerEdit | None = None) -> Iterator[nn.Module]:
        """While the context is open, the layer's weights are in memory, with the edit; freed memory is given back after it.

        Of a compressed model, the modules of other layers whose factors this layer shares are in memory too, on the CPU.
        """
        with in_memory(self._view, self.name) as layer, edited(layer.to(device), self.name, edit):
            yield layer

    def passed_by(self, calls: Sequence[Call] | None = None) -> list[Any]:
        """What the layer would put out for these calls (all by default) if it did nothing; not while it is loaded."""
        calls = self.calls if calls is None else calls
        template = passed_by(self._view.layers[self.index], calls[0])
        return [with_hidden(template, call.hidden) for call in calls]

    def answer(self, outputs: Sequence[Any] | None) -> None:
        """Say what the layer puts out, one output per call; the batches go on when the next turn begins.

        Args:
            outputs: as the layer returns them. None is allowed of the last layer only, where no results are wanted.
        """
        self._forward._outputs = outputs
