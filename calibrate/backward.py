"""Statistics of gradients: one backward pass over a model that is never held whole.

What it gives: `grad_gram`, the output side of the two-sided metric tr(ΔWᵀ G ΔW C), `fisher_in`, the weights of FWSVD, and
`weight_grad`, the mean gradient of the weight itself (for first-order changes of the loss).
Sources: token-wise Kronecker factors as in KFAC-SVD (LEMS, ICML'26); Fisher-weighted SVD (ICLR'22); labels drawn from the model
itself make it the true Fisher (Martens, arXiv:1412.1193), with which ½ tr(ΔWᵀ G ΔW C) is in nats per token.

How: the forward goes layer by layer as everywhere in lrc and leaves each layer's input on disk. Final norm, head and loss come
next, a batch at a time. Then the layers come in again, the last one first: each is run once more from its stored input, this
time with autograd, and hands on the gradient with respect to that input, in the activations' own dtype. Only the hidden state
carries gradients from layer to layer; whatever else a model passes to its layers (masks, rotary tables, anything made of
earlier hidden states) counts as constant.

Memory: the largest layer + 3 × samples × length × hidden in the model's dtype, as in the forward pass + one batch's autograd
graph of one layer per device + 8 bytes × Σ out² over a layer's targets, per device (with `grad_gram`) + 4 bytes × Σ out · in of
them, per device (with `weight_grad`). At the tail: final norm,
head, and two to three times one batch's logits. Disk: layers × samples × length × hidden in the model's dtype until the layers
are done, and 2 bytes × Σ out² (`grad_gram`) and 4 × Σ out · in (`weight_grad`) over all targets for good.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..compress.base import BACKWARD_NEEDS, TargetStats
from ..errors import CheckpointError, NonFiniteError
from ..model.lockstep import Call, Lockstep, check_finite, on_host, run_layer, side_by_side
from .gradients import GradientCollector, GradientSettings
from .labels import draw, uniforms
from .packing import token_hash
from .spill import Spill
from .stats import TargetLike
from .store import LAYOUT, MANIFEST, StatsStore

SPILL = "activations"  # inside the statistics' folder, until the pass is done
LOGITS_AT_ONCE = 1 << 24  # widened to float32 together


class LayerTarget(TargetLike, Protocol):
    """A target that knows its layer (model.targets.Target is one)."""

    @property
    def layer(self) -> int: ...


class Fingerprinted(Protocol):
    def fingerprint(self) -> str: ...


class View(Protocol):
    """What the pass asks of a model (model.view.ModelView is one)."""

    model: Any
    layers: list[nn.Module]
    layer_names: list[str]
    dtype: torch.dtype

    @property
    def source(self) -> Fingerprinted: ...
    @property
    def targets(self) -> Sequence[LayerTarget]: ...
    def load(self, prefix: str) -> nn.Module: ...
    def unload(self, prefix: str = "") -> None: ...
    def load_outside(self) -> None: ...
    def load_end(self) -> None: ...


def collect_gradients(
    view: View,
    tokens: Tensor,
    batch: int,
    needs: frozenset[str],
    settings: GradientSettings,
    folder: Path,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    *,
    targets: Sequence[LayerTarget] | None = None,
    release: Callable[[], None] = lambda: None,
    notify: Callable[[int, float], None] = lambda layer, seconds: None,
) -> StatsStore:
    """Gradient statistics of the original model's targets, on disk, a file per layer; what lies there already is used.

    An interrupted call goes on with the layer that it was at: the layers before it are run forward again, those after it are
    not looked at. The result does not depend on `batch` or the number of devices, but for rounding.

    Args:
        view: the model; its weights come and go.
        tokens: (samples, length) token ids.
        batch: samples that go through a layer at once.
        needs: of `base.BACKWARD_NEEDS`.
        settings: of the loss and the tokens.
        folder: a folder of their own (forward statistics lie elsewhere).
        devices: batches are spread over them; the loss is computed on the first.
        targets: those to look at, all of the model by default.
        release: called whenever weights have gone (`passes.give_back`).
        notify: called with (layers finished, seconds of this one); the forward pass counts to its last layer.

    Returns:
        The store; `store.read(layer name, target names)` gives `TargetStats` with `grad_gram` and `fisher_in`.

    Raises:
        OutputError: no space, or the folder cannot be written.
        NonFiniteError: activations, logits or gradients overflow.
        ModelError: a target's gradients cannot be had.
    """
    if not needs or not needs <= BACKWARD_NEEDS:
        raise ValueError(f"{sorted(needs)} are not all statistics of gradients; known: {sorted(BACKWARD_NEEDS)}")
    targets = view.targets if targets is None else targets
    identity = {
        "model": view.source.fingerprint(),
        "tokens": token_hash(tokens),
        "dtype": str(view.dtype),
        "targets": [target.name for target in targets],
        "gradients": settings.model_dump(mode="json"),
    }
    store = StatsStore(folder, identity, dict.fromkeys((target.name for target in targets), needs))
    missing = not all(store.has(name) for name in view.layer_names)
    if missing or (folder / SPILL).exists():
        with store.alone(), torch.no_grad():
            spill = Spill(folder / SPILL, json.dumps([identity, sorted(store.kinds)], sort_keys=True))
            if missing:
                _all_layers(view, tokens, batch, targets, store, spill, settings, devices, release, notify)
            spill.remove()
    return store


def _all_layers(
    view: View,
    tokens: Tensor,
    batch: int,
    targets: Sequence[LayerTarget],
    store: StatsStore,
    spill: Spill,
    settings: GradientSettings,
    devices: Sequence[torch.device],
    release: Callable[[], None],
    notify: Callable[[int, float], None],
) -> None:
    """Forward once, then back through the layers that an interrupted call left; arguments as of `collect_gradients`."""
    resumed = spill.resume()
    if resumed and not all(store.has(name) for name in view.layer_names[resumed[0] :]):
        resumed = None  # a layer's file was deleted; its gradients are gone
    start = len(view.layers) if resumed is None else resumed[0]
    started = time.perf_counter()
    through = _forward(view, tokens, batch, start, spill, settings, devices, release)
    if resumed is not None:
        through.gradients = list(resumed[1].split(batch))
        del resumed
    for index in reversed(range(start)):
        name = view.layer_names[index]
        own = [target for target in targets if target.layer == index]
        rest = through.calls.pop()
        stats = _layer_back(view.load(name), index, name, own, rest, through.gradients, spill, store.kinds, settings, devices)
        view.unload(name)
        store.write(name, stats)
        release()
        spill.finish(index, through.gradients)
        notify(len(view.layers) - index, time.perf_counter() - started)
        started = time.perf_counter()


def read_gradients(folder: Path, layer: str) -> dict[str, TargetStats]:
    """Target name -> its `grad_gram` and `fisher_in`, of one layer that `collect_gradients` has written into `folder`.

    Raises:
        CheckpointError: nothing of this layer is there, or its file is damaged.
    """
    path = folder / f"{layer}.safetensors"
    try:
        held = json.loads((folder / MANIFEST).read_text())
        if held.get("layout") != LAYOUT:  # opening it would empty it
            raise ValueError("it was written by another lrc")
        with safe_open(path, "pt") as file:
            names = list(json.loads(file.metadata()["targets"]))
        return StatsStore(folder, held["identity"], {}).read(layer, names)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Delete that folder; it is collected anew.") from error


@dataclass
class _Rest:
    """A layer's call without its hidden state, which lies on disk."""

    leaves: list[Any]
    spec: TreeSpec
    place: int

    @classmethod
    def of(cls, call: Call) -> _Rest:
        leaves, spec = tree_flatten((call.args, dict(call.kwargs)))
        place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        leaves[place] = None
        return cls(leaves, spec, place)

    def call(self, hidden: Tensor) -> Call:
        device = hidden.device
        leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        leaves[self.place] = hidden
        return Call(*tree_unflatten(leaves, self.spec))


@dataclass
class _Through:
    """What the forward leaves in memory: per layer and batch the calls, and the gradients at the last layer's output."""

    calls: list[list[_Rest]]
    gradients: list[Tensor]


def _forward(
    view: View,
    tokens: Tensor,
    batch: int,
    stop: int,
    spill: Spill,
    settings: GradientSettings,
    devices: Sequence[torch.device],
    release: Callable[[], None],
) -> _Through:
    """Go forward up to the call of layer `stop - 1`; where that is the last layer, through it and the loss."""
    found = _Through([], [])
    if stop == 0:
        return found
    batches = tokens.split(batch)
    view.load_outside()
    with Lockstep(view.model, view.layers) as steps:
        steps.start([{"input_ids": ids} for ids in batches])
        view.unload()
        release()
        spill.require_space(stop * sum(call.hidden.nbytes for call in steps.calls))
        for index in range(stop):
            name = view.layer_names[index]
            spill.put(index, [call.hidden for call in steps.calls])
            found.calls.append([_Rest.of(call) for call in steps.calls])
            if index == stop - 1 and stop < len(view.layers):
                return found
            outputs = _run(view.load(name), name, steps.calls, devices)
            view.unload(name)
            release()
            if index < len(view.layers) - 1:
                steps.answer(outputs)
        view.load_end()
        _outside_to(view.model, devices[0])
        ends = [_leaf(output, devices[0]) for output in outputs]
        del outputs
        results = steps.finish([output for output, _ in ends])
        for number, (_, hidden) in enumerate(ends):
            with torch.enable_grad():
                result = next(results)
            logits = result.logits if hasattr(result, "logits") else result[0]
            check_finite(logits.detach(), "the logits", number)
            found.gradients.append(_loss_gradient(logits, hidden, batches[number], number * batch, settings))
    view.unload()
    release()
    return found


def _leaf(output: Any, device: torch.device) -> tuple[Any, Tensor]:
    """A layer's output on `device`, and the hidden state in it, from which autograd starts."""
    leaves, spec = tree_flatten(output)
    place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    leaves[place] = hidden = leaves[place].detach().requires_grad_()
    return tree_unflatten(leaves, spec), hidden


def _outside_to(model: nn.Module, device: torch.device) -> None:
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(device)


def _loss_gradient(logits: Tensor, hidden: Tensor, ids: Tensor, first: int, settings: GradientSettings) -> Tensor:
    """∂loss/∂hidden on the CPU, the loss being the cross entropy summed over each sample's tokens.

    Args:
        logits: (samples, length, words).
        hidden: the leaf of autograd that they depend on.
        ids: (samples, length).
        first: number of the first sample.
    """
    gradient = torch.zeros_like(logits)
    positions = logits.shape[1] if settings.labels == "sampled" else logits.shape[1] - 1
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    for sample in range(len(ids)):
        drawn = uniforms(settings.seed, first + sample, logits.shape[1]).to(logits.device)
        following = ids[sample, 1:].to(logits.device)
        for start in range(0, positions, step):
            stop = min(start + step, positions)
            part = logits[sample, start:stop].detach()
            p = part.to(torch.promote_types(part.dtype, torch.float32)).softmax(-1)
            labels = draw(p, drawn[start:stop]) if settings.labels == "sampled" else following[start:stop]
            p[torch.arange(len(p), device=p.device), labels] -= 1
            gradient[sample, start:stop] = p
    back = torch.autograd.grad(logits, hidden, gradient)[0].cpu()
    return _finite(back, "the output of the last layer")


def _layer_back(
    layer: nn.Module,
    index: int,
    name: str,
    targets: Sequence[TargetLike],
    rest: Sequence[_Rest],
    gradients: list[Tensor],
    spill: Spill,
    needs: frozenset[str],
    settings: GradientSettings,
    devices: Sequence[torch.device],
) -> dict[str, TargetStats]:
    """Run a layer with autograd batch by batch; `gradients` become those with respect to its inputs."""
    layer.requires_grad_(False)
    copies = _copies(layer, devices)
    collectors = [
        GradientCollector(each, name, targets, needs, settings, device) for each, device in zip(copies, devices, strict=True)
    ]

    def back(worker: int, batch: int) -> None:
        x = spill.get(index, batch, devices[worker]).requires_grad_()
        collectors[worker].expect(*x.shape[:2])
        with torch.enable_grad():
            output = run_layer(copies[worker], rest[batch].call(x))
        main = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
        (gradient,) = torch.autograd.grad(main, x, gradients[batch].to(main))
        gradients[batch] = _finite(gradient.cpu(), name)

    for collector in collectors:
        collector.__enter__()
    try:
        _spread(len(rest), len(devices), back)
    finally:
        for collector in collectors:
            collector.__exit__()
    return collectors[0].result(collectors[1:])


def _run(layer: nn.Module, name: str, calls: Sequence[Call], devices: Sequence[torch.device]) -> list[Any]:
    """Answer every batch's call; outputs on the CPU."""
    copies = _copies(layer, devices)
    outputs: list[Any] = [None] * len(calls)

    def answer(worker: int, batch: int) -> None:
        with torch.no_grad():  # each thread has its own mode
            output = run_layer(copies[worker], calls[batch].to(devices[worker]))
        check_finite(output, name, batch)
        outputs[batch] = on_host(output)

    _spread(len(calls), len(devices), answer)
    return outputs


def _copies(layer: nn.Module, devices: Sequence[torch.device]) -> list[nn.Module]:
    return [layer.to(devices[0])] + [copy.deepcopy(layer).to(device) for device in devices[1:]]


def _spread(batches: int, workers: int, work: Callable[[int, int], None]) -> None:
    """Call work(worker, batch) for every batch."""

    def share(worker: int) -> None:
        for batch in range(worker, batches, workers):
            work(worker, batch)

    side_by_side(share, workers)


def _finite(gradient: Tensor, where: str) -> Tensor:
    if not torch.isfinite(gradient).all():
        bad = int((~torch.isfinite(gradient)).sum())
        raise NonFiniteError(
            f"{where}: {bad} of {gradient.numel()} gradients are not finite ({gradient.dtype}).",
            "Try --dtype bfloat16 or --dtype float32.",
        )
    return gradient
