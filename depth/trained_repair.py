"""Trained repairs: the first layer of a run learns to replace the run, or the end of the model learns to do without it.

Both are trained by refine/trainer.py, which keeps the state that is best on held-out text; both change only the values of plain
tensors in the remaining layers and outside the layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..calibrate.layerwise import TOKENS_PER_BATCH
from ..model.ablation import Ablation, losses
from ..model.events import Event, Notify, silent
from ..model.layer_edit import LayerEdit, edited
from ..model.layerwise import layerwise
from ..model.lockstep import Call, hidden_of, passed_by, run_calls, with_hidden
from ..model.machine.host_memory import give_back
from ..model.view import ModelView
from ..refine.objectives import BlockExamples, BlockSettings, refine_block
from ..refine.trainer import Course, Refinement, Trainer, Windows, checked_dtypes
from .base import Training
from .model_edit import ModelEdit
from .repair_record import RepairRecord, RunRecord
from .repairs.partial_finetune import LAST_LAYERS


def block_settings(training: Training, seed: int) -> BlockSettings:
    """The trainer's settings; hidden states are compared by their plain squared error."""
    return BlockSettings(**training.model_dump(exclude_none=True), loss="mse", seed=seed)


def train(
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[int], Tensor],
    tokens: Sequence[int],
    judge: Callable[[], float],
    settings: BlockSettings,
    notify: Notify = silent,
) -> Refinement:
    """Train any parameters on any loss of batches; the parameters end in their best state, without gradients.

    Args:
        parameters: as `checked_dtypes` gives them.
        loss: number of a batch -> the sum of its tokens' losses.
        tokens: how many each batch has.
        judge: computes the held-out loss.
        settings: its `loss` and `epoch_tokens` are not used.

    Raises:
        NonFiniteError: the held-out loss is not finite before the first step.
    """

    def backward(index: int, total: int) -> float:
        each = loss(index) / total
        each.backward()
        return each.item()

    started, per_step = time.perf_counter(), max(1, round(settings.batch_tokens * len(tokens) / sum(tokens)))
    steps = max(1, round(len(tokens) / per_step))
    trainer = Trainer(list(parameters.values()), settings, steps * settings.epochs)
    return trainer.run(Course(backward, tokens, per_step, steps, judge, started), notify)


def streamline(
    view: ModelView,
    model_edit: ModelEdit,
    windows: Windows,
    settings: BlockSettings,
    device: torch.device,
    notify: Notify,
) -> ModelEdit:
    """The model edit's one run, less its first layer, which is trained to put out what the last layer of the run did.

    Args:
        model_edit: drops the whole run.
        windows: the held-out ones judge twice: by the squared error of hidden states, then by the model's loss.
        settings: of the training.
        notify: is told of each epoch.
    """
    first, *rest = model_edit.dropped
    learnt, report = _trained_layer(view, model_edit.dropped, windows, settings, device, notify)
    give_back()
    dropped, name = frozenset(rest), view.layer_names[first]
    before, after = losses(view, windows.held_out, [Ablation(dropped), Ablation(dropped, {first: learnt})], device)
    keep = after <= before
    record = RepairRecord(
        "streamline", windows.held_out.numel(), before, after if keep else before,
        runs=[RunRecord(list(model_edit.dropped), keep, name, windows.train.numel())],
        training=_facts(report),
    )  # fmt: skip
    edits = {name: learnt} if keep else {}
    return replace(model_edit, dropped=tuple(rest), edits=edits, record=record.added_to(model_edit.record))


def _trained_layer(
    view: ModelView,
    run: Sequence[int],
    windows: Windows,
    settings: BlockSettings,
    device: torch.device,
    notify: Notify,
) -> tuple[LayerEdit, Refinement]:
    """The values that a run's first layer learns, and how its training went."""
    examples, held_out = _run_examples(view, run, windows, device)
    name = view.layer_names[run[0]]
    layer = view.load(name).to(device)
    started = time.perf_counter()
    report = refine_block(
        layer, examples, held_out, settings,
        lambda epoch: notify(_told(f"epoch {epoch.done}: held-out error {epoch.loss:.4g}", started)),
        everything=True,
    )  # fmt: skip
    learnt = LayerEdit((), {path: value.detach().to("cpu", copy=True) for path, value in layer.named_parameters()})
    view.unload(name)
    return learnt, report


@torch.no_grad()
def _run_examples(
    view: ModelView, run: Sequence[int], windows: Windows, device: torch.device
) -> tuple[BlockExamples, BlockExamples]:
    """What a run's first layer is called with and what its last layer puts out: (to train on, held out)."""
    batches = windows.train.split(max(1, TOKENS_PER_BATCH // windows.train.shape[1]))
    held_out = windows.held_out.split(max(1, TOKENS_PER_BATCH // windows.held_out.shape[1]))
    calls: list[Call] = []
    goals: list[Tensor] = []
    with layerwise(view, [*batches, *held_out]) as forward:
        for turn in forward:
            if turn.index == run[0]:
                calls = list(turn.calls)
            with turn.loaded(device) as layer:
                outputs = run_calls(layer, turn.name, turn.calls, device)
            if turn.index == run[-1]:
                goals = [hidden_of(output) for output in outputs]
                break
            turn.answer(outputs)
            del outputs
    count = len(batches)
    return BlockExamples(calls[:count], goals[:count]), BlockExamples(calls[count:], goals[count:])


def finetune_end(
    view: ModelView,
    model_edit: ModelEdit,
    windows: Windows,
    settings: BlockSettings,
    device: torch.device,
    notify: Notify,
) -> ModelEdit:
    """The model edit, with final norm, output head and the last layers trained on the tokens themselves; as `streamline`.

    A head that is tied to the embedding is not trained.
    """
    remaining = [layer for layer in range(len(view.layers)) if layer not in model_edit.dropped]
    last = remaining[-LAST_LAYERS:]
    batches = [*windows.train.split(1), *windows.held_out.split(1)]
    states = _states_before(view, model_edit, last[0], batches, device)
    held_out = range(len(windows.train), len(batches))
    with _End(view, model_edit, last, device) as end:
        parameters = end.parameters()

        def loss(number: int) -> Tensor:
            ids = batches[number].to(device)
            logits = end(batches[number], states[number])[:, :-1]
            return cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

        def judge() -> float:
            with torch.no_grad():
                found = [float(loss(number)) for number in held_out]
            return sum(found) / (len(held_out) * (windows.held_out.shape[1] - 1))

        started = time.perf_counter()
        report = train(
            parameters, loss, [windows.train.shape[1] - 1] * len(windows.train), judge, settings,
            lambda epoch: notify(_told(f"epoch {epoch.done}: held-out loss {epoch.loss:.4f}", started)),
        )  # fmt: skip
        better = report.best < report.start
        values = {name: value.detach().to("cpu", copy=True) for name, value in parameters.items()} if better else {}
    edits, outside = _apart(view, values)
    record = RepairRecord(
        "partial-finetune", windows.held_out.numel(), report.start, report.best, layers=last, accepted=better,
        head="tied, not trained" if view.untied_head is None else "trained", training=_facts(report),
    )  # fmt: skip
    return replace(model_edit, edits=edits, outside=outside, record=record.added_to(model_edit.record))


@torch.no_grad()
def _states_before(
    view: ModelView, model_edit: ModelEdit, layer: int, batches: Sequence[Tensor], device: torch.device
) -> list[Tensor]:
    """The hidden states (samples, length, hidden) that reach a layer of the pruned model, per batch."""
    with layerwise(view, batches) as forward:
        for turn in forward:
            if turn.index == layer:
                return [call.hidden for call in turn.calls]
            if turn.index in model_edit.dropped:
                turn.answer(turn.passed_by())
            else:
                with turn.loaded(device, model_edit.edit(turn.name)) as module:
                    turn.answer(run_calls(module, turn.name, turn.calls, device))
    raise ValueError(f"there is no layer {layer}")


def _apart(view: ModelView, values: Mapping[str, Tensor]) -> tuple[dict[str, LayerEdit], dict[str, Tensor]]:
    """Trained values by layer, and those outside the layers."""
    outside, inside = {}, dict[str, dict[str, Tensor]]()
    for full, value in values.items():
        name = next((layer for layer in view.layer_names if full.startswith(layer + ".")), None)
        if name is None:
            outside[full] = value
        else:
            inside.setdefault(name, {})[full.removeprefix(name + ".")] = value
    return {name: LayerEdit((), tensors) for name, tensors in inside.items()}, outside


def _facts(report: Refinement) -> dict[str, Any]:
    return {
        "parameters": report.parameters, "steps": report.steps, "seconds": round(report.seconds, 1), "stopped": report.stopped,
        "start": report.start, "best": report.best,
    }  # fmt: skip


class _End:
    """The end of a pruned model (the last layers, the final norm, the head), run from given hidden states.

    The model's own forward runs, so that its own processing of states and logits is kept; its earlier layers do nothing.
    """

    def __init__(self, view: ModelView, model_edit: ModelEdit, last: Sequence[int], device: torch.device) -> None:
        self._view, self._model_edit, self._last, self._device = view, model_edit, list(last), device
        self._state = torch.empty(0)
        self._templates: dict[int, Any] = {}
        self._open = ExitStack()

    def __enter__(self) -> _End:
        view = self._view
        view.load_outside()
        view.load_end()
        self._open.callback(view.unload)
        self._open.enter_context(_outside_on(view, self._device))
        for index, name in enumerate(view.layer_names):
            layer = view.layers[index]
            if index in self._last:
                self._open.callback(view.unload, name)
                self._open.enter_context(edited(view.load(name).to(self._device), name, self._model_edit.edit(name)))
            else:
                layer.forward = partial(self._hand_on, index)
                self._open.callback(delattr, layer, "forward")
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self, ids: Tensor, state: Tensor) -> Tensor:
        """Logits of one window, from the state that reaches the first of the last layers."""
        self._state = state.to(self._device)
        logits: Tensor = self._view.model(input_ids=ids.to(self._device), use_cache=False).logits
        return logits

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters: all of the last layers, vectors outside the layers (the final norm), an untied head."""
        view, head = self._view, self._view.untied_head
        inside = tuple(f"{view.layer_names[index]}." for index in self._last)
        layers = f"{view.layers_path}."
        found = {}
        for name, parameter in view.model.named_parameters():
            outer = not name.startswith(layers) and (parameter.ndim == 1 or (head is not None and parameter is head.weight))
            if name.startswith(inside) or outer:
                found[name] = parameter
        return checked_dtypes(found)

    def _hand_on(self, index: int, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs)
        if index not in self._templates:
            self._templates[index] = passed_by(self._view.layers[index], call)
        return with_hidden(self._templates[index], self._state if index < self._last[0] else call.hidden)


@contextmanager
def _outside_on(view: ModelView, device: torch.device) -> Iterator[None]:
    """While the context is open, modules outside the layers are on the device; at its end their buffers are restored."""
    moved: list[tuple[nn.Module, str, Tensor]] = []
    if device.type != "cpu":
        for path, module in view.model.named_modules():
            if path.startswith(view.layers_path):
                continue
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(device)
            for name, buffer in module.named_buffers(recurse=False):
                moved.append((module, name, buffer))
                setattr(module, name, buffer.to(device))
    try:
        yield
    finally:
        for module, name, buffer in moved:
            setattr(module, name, buffer)


def _told(what: str, started: float) -> Event:
    return Event(what, seconds=time.perf_counter() - started)
