"""A pass over a model layer by layer, all calibration batches at once, with or without statistics of each layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.base import TargetStats
from ..model.layer_edit import LayerEdit
from ..model.layerwise import layerwise
from ..model.lockstep import Call, check_finite, on_host, run_layer
from ..model.machine.workers import side_by_side
from ..model.targets import Target
from ..model.view import ModelView
from .stats import LayerCollector, Wanted

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
    targets: Sequence[Target] = (),
    what: Wanted | None = None,
) -> tuple[list[Any], dict[str, TargetStats]]:
    """Answer every batch's call, and collect the statistics `what` of the targets; batches are spread over the devices.

    Returns:
        one output per call, on the CPU; target name -> its statistics (empty where `what` is None).
    """
    outputs: list[Any] = [None] * len(calls)
    return outputs, _collect(layer, name, calls, devices, targets, what, outputs)


def run_in_chunks(
    layer: nn.Module,
    name: str,
    calls: Sequence[Call],
    devices: Sequence[torch.device],
    chunks: Sequence[Sequence[Target]],
    what: Wanted,
    take: Callable[[dict[str, TargetStats]], None],
) -> list[Any]:
    """Answer every batch's call, and collect statistics chunk by chunk, so that those of one chunk are in memory at a time.

    The layer runs once per chunk; it must not be changed in between.

    Args:
        chunks: of the layer's targets, at least one (`stats.chunks_of`).
        what: the statistics of all of them.
        take: called with each chunk's statistics; the next chunk is collected when it returns.

    Returns:
        one output per call, on the CPU.
    """
    outputs: list[Any] = [None] * len(calls)
    for number, targets in enumerate(chunks):
        take(_collect(layer, name, calls, devices, targets, what, outputs if number == 0 else None))
    return outputs


def _collect(
    layer: nn.Module,
    name: str,
    calls: Sequence[Call],
    devices: Sequence[torch.device],
    targets: Sequence[Target],
    what: Wanted | None,
    outputs: list[Any] | None,
) -> dict[str, TargetStats]:
    """The statistics `what` of the targets over all calls; what the layer returns is put into `outputs`, if that is given."""
    copies = copies_on(layer, devices)
    collectors = (
        [LayerCollector(each, name, targets, what, device) for each, device in zip(copies, devices, strict=True)]
        if what
        else []
    )

    def answer(worker: int, batch: int) -> None:
        call = calls[batch].to(devices[worker])
        if collectors:
            collectors[worker].samples, collectors[worker].length = call.hidden.shape[:2]
        with torch.no_grad():  # each thread has its own mode
            output = run_layer(copies[worker], call)
        check_finite(output, name, batch)
        if outputs is not None:
            outputs[batch] = on_host(output)

    with ExitStack() as watching:
        for collector in collectors:
            watching.enter_context(collector)
        spread(len(calls), len(devices), answer)
    return collectors[0].result(collectors[1:]) if collectors else {}


def copies_on(layer: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
    """The layer moved to the first device, and a copy of it on each other one."""
    return [layer.to(devices[0])] + [copy.deepcopy(layer).to(device) for device in devices[1:]]


def spread(batches: int, workers: int, work: Callable[[int, int], None]) -> None:
    """Call work(worker, batch) once for every batch; worker w takes the batches w, w + workers, ..."""

    def share(worker: int) -> None:
        for batch in range(worker, batches, workers):
            work(worker, batch)

    side_by_side(share, workers)
