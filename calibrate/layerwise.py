"""A pass over a model layer by layer, all calibration batches at once, with or without statistics of each layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.base import TargetStats
from ..model.layer_edit import LayerEdit
from ..model.layerwise import layerwise
from ..model.lockstep import Call, check_finite, on_host, run_layer, side_by_side
from ..model.view import ModelView
from .stats import LayerCollector, TargetLike, Wanted

TOKENS_PER_BATCH = 2048  # calibration tokens that go through a layer at once, unless one sample is longer

Visit = Callable[[int, str, nn.Module, Sequence[Call]], "list[Any] | None"]


def through_layers(
    view: ModelView,
    tokens: Sequence[Tensor],
    visit: Visit,
    dropped: Collection[int] = frozenset(),
    edit: Callable[[str], LayerEdit | None] = lambda name: None,
) -> None:
    """Let `visit(index, name, layer, calls)` compute the outputs of every layer, whose weights are in memory meanwhile.

    Args:
        view: the model.
        tokens: token ids per batch, (samples, length) each.
        visit: returns one output per call; what it returns for the last layer is not used.
        dropped: layers that do nothing: every batch's hidden state skips them.
        edit: layer name -> what is changed in the layer while it is in memory.
    """
    for ids in tokens:
        view.require_tokens(ids)
    with layerwise(view, tokens) as forward:
        for turn in forward:
            if turn.index in dropped:
                turn.answer(turn.passed_by())
            else:
                with turn.loaded(edit=edit(turn.name)) as layer:
                    turn.answer(visit(turn.index, turn.name, layer, turn.calls))


def run_batches(
    layer: nn.Module,
    name: str,
    calls: Sequence[Call],
    devices: Sequence[torch.device],
    targets: Sequence[TargetLike] = (),
    what: Wanted | None = None,
) -> tuple[list[Any], dict[str, TargetStats]]:
    """Answer every batch's call, and collect statistics where `what` says so; batches are spread over the devices."""
    copies = [layer.to(devices[0])] + [copy.deepcopy(layer).to(device) for device in devices[1:]]
    collectors = (
        [LayerCollector(each, name, targets, what, device) for each, device in zip(copies, devices, strict=True)]
        if what
        else []
    )
    outputs: list[Any] = [None] * len(calls)

    def share(worker: int) -> None:
        with torch.no_grad():
            for batch in range(worker, len(calls), len(devices)):
                call = calls[batch].to(devices[worker])
                if collectors:
                    collectors[worker].samples, collectors[worker].length = call.hidden.shape[:2]
                output = run_layer(copies[worker], call)
                check_finite(output, name, batch)
                outputs[batch] = on_host(output)

    for collector in collectors:
        collector.__enter__()
    try:
        side_by_side(share, len(devices))
    finally:
        for collector in collectors:
            collector.__exit__()
    return outputs, collectors[0].result(collectors[1:]) if collectors else {}
