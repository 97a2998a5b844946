"""Statistics of gradients: one backward pass over a model of which one layer at a time is in memory.

What it collects: `grad_gram`, the output side of the two-sided metric tr(ΔWᵀ G ΔW C), `fisher_in`, the weights of FWSVD, and
`weight_grad`, the mean gradient of the weight itself (for first-order changes of the loss).
Sources: token-wise Kronecker factors as in KFAC-SVD (LEMS, ICML'26); Fisher-weighted SVD (ICLR'22); labels drawn from the model
itself make it the true Fisher (Martens, arXiv:1412.1193), with which ½ tr(ΔWᵀ G ΔW C) is in nats per token.

How: the forward runs layer by layer, as everywhere in lrc, and writes each layer's input to disk. Final norm, head and loss
come next, one batch at a time. Then the layers are loaded again, the last one first. Each layer runs once more from its stored
input, this time with autograd, and yields the gradient with respect to that input, in the activations' own dtype. Only the
hidden state carries gradients from layer to layer. All other arguments of a layer (masks, rotary tables, anything made of
earlier hidden states) count as constants.

Memory: the largest layer + 3 × samples × length × hidden in the model's dtype, as in the forward pass + one batch's autograd
graph of one layer per device + 8 bytes × Σ out² over one chunk of a layer's targets, per device (with `grad_gram`) + 4 bytes ×
Σ out · in of them, per device (with `weight_grad`). At the end of the model: final norm, head, and two to three times one
batch's logits. A layer whose sums take more than `stats.STATISTICS_AT_ONCE` has several chunks; it runs forward and back once
for each.
Disk: layers × samples × length × hidden in the model's dtype until the pass is done; 2 bytes × Σ out² (`grad_gram`) and
4 × Σ out · in (`weight_grad`) over all targets are kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..compress.base import BACKWARD_NEEDS, TargetStats
from ..errors import NonFiniteError
from ..model.events import Event, Notify, silent
from ..model.lockstep import Call, Lockstep, check_finite, run_layer
from ..model.machine.host_memory import give_back
from ..model.targets import Target
from ..model.view import ModelView
from .gradients import GradientCollector, GradientSettings, gradient_bytes
from .layerwise import copies_on, run_batches, spread
from .packing import derived_seed, token_hash
from .spill import Spill
from .stats import chunks_of
from .store import StatsStore

SPILL = "activations"  # inside the statistics' folder, until the pass is done
LOGITS_AT_ONCE = 1 << 24  # logits that are converted to float32 together


@dataclass(frozen=True)
class GradientPass:
    """One backward pass over the original model: its input and what it collects.

    Args:
        view: the model; its layers are loaded and unloaded one after the other.
        tokens: (samples, length) token ids.
        batch: samples that run through a layer together.
        needs: the statistics to collect, of `base.BACKWARD_NEEDS`.
        settings: of the loss, and of the tokens that count.
        devices: the batches are spread over them; the loss is computed on the first.
    """

    view: ModelView
    tokens: Tensor
    batch: int
    needs: frozenset[str]
    settings: GradientSettings
    devices: Sequence[torch.device] = (torch.device("cpu"),)

    @property
    def identity(self) -> dict[str, Any]:
        """What the statistics are of; a JSON mapping."""
        return {
            "model": self.view.fingerprint(),
            "tokens": token_hash(self.tokens),
            "dtype": str(self.view.dtype),
            "targets": [target.name for target in self.view.targets],
            "gradients": self.settings.model_dump(mode="json"),
        }

    def collector(self, layer: nn.Module, name: str, targets: Sequence[Target], device: torch.device) -> GradientCollector:
        """A collector for some targets of a layer on one device."""
        return GradientCollector(layer, name, targets, self.needs, self.settings, device)


def collect_gradients(work: GradientPass, folder: Path, notify: Notify = silent) -> StatsStore:
    """Collect gradient statistics of the original model's targets on disk, a file per layer; existing files are used.

    An interrupted call resumes at the layer that it had reached: the layers before it run forward again, those after it are
    not loaded. The result depends on `work.batch` and on the number of devices only by rounding.

    Args:
        folder: a folder of its own (forward statistics have another).
        notify: is told of each finished layer; the seconds of the last one include the forward pass.

    Returns:
        The store; `store.read(layer name, target names)` gives `TargetStats` with the statistics of `work.needs`.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
        NonFiniteError: activations, logits or gradients overflow.
        ModelError: the gradients of a target cannot be observed.
    """
    if not work.needs or not work.needs <= BACKWARD_NEEDS:
        raise ValueError(f"{sorted(work.needs)} are not all statistics of gradients; known: {sorted(BACKWARD_NEEDS)}")
    view, identity = work.view, work.identity
    store = StatsStore(folder, identity, dict.fromkeys((target.name for target in view.targets), work.needs))
    work = replace(work, needs=store.kinds)  # the folder may be of a collection that asked for more
    missing = not all(store.has(name) for name in view.layer_names)
    if missing or (folder / SPILL).exists():
        with store.alone(), torch.no_grad():
            spill = Spill(folder / SPILL, json.dumps([identity, sorted(store.kinds)], sort_keys=True))
            if missing:
                _all_layers(work, store, spill, notify)
            spill.remove()
    return store


def _all_layers(work: GradientPass, store: StatsStore, spill: Spill, notify: Notify) -> None:
    """Run forward once, then back through the layers that an interrupted call did not finish."""
    view = work.view
    resumed = spill.resume()
    if resumed and not all(store.has(name) for name in view.layer_names[resumed[0] :]):
        resumed = None  # a layer's file was deleted, and the gradients from which it could be made are gone
    start = len(view.layers) if resumed is None else resumed[0]
    started = time.perf_counter()
    through = _forward(work, start, spill)
    if resumed is not None:
        through.gradients = list(resumed[1].split(work.batch))
        del resumed
    for index in reversed(range(start)):
        name = view.layer_names[index]
        back = _LayerBack(work, index, view.load(name), through.calls.pop(), through.gradients, spill)
        own = [target for target in view.targets if target.layer == index]
        *first, last = chunks_of(own, partial(gradient_bytes, needs=work.needs))
        with store.adding(name) as add:
            for chunk in first:
                add(back.run(chunk))
            add(back.run(last, through.gradients))
        del back
        view.unload(name)
        give_back()
        spill.finish(index, through.gradients)
        count = len(view.layers)
        notify(Event("gradients", count - index, count, time.perf_counter() - started))
        started = time.perf_counter()


@dataclass
class _Rest:
    """The arguments of a layer's call without the hidden state, which is on disk."""

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
    """What the forward keeps in memory: the calls per layer and batch, and the gradients at the last layer's output."""

    calls: list[list[_Rest]]
    gradients: list[Tensor]


def _forward(work: GradientPass, stop: int, spill: Spill) -> _Through:
    """Run forward up to the call of layer `stop - 1`; where that is the last layer, through it and the loss."""
    view, device = work.view, work.devices[0]
    found = _Through([], [])
    if stop == 0:
        return found
    batches = work.tokens.split(work.batch)
    view.load_outside()
    with Lockstep(view.model, view.layers) as steps:
        steps.start([{"input_ids": ids} for ids in batches])
        view.unload()
        give_back()
        spill.require_space(stop * sum(call.hidden.nbytes for call in steps.calls))
        for index in range(stop):
            name = view.layer_names[index]
            spill.put(index, [call.hidden for call in steps.calls])
            found.calls.append([_Rest.of(call) for call in steps.calls])
            if index == stop - 1 and stop < len(view.layers):
                return found
            outputs = run_batches(view.load(name), name, steps.calls, work.devices)[0]
            view.unload(name)
            give_back()
            if index < len(view.layers) - 1:
                steps.answer(outputs)
        view.load_end()
        _outside_to(view.model, device)
        ends = [_leaf(output, device) for output in outputs]
        del outputs
        results = steps.finish([output for output, _ in ends])
        for number, (_, hidden) in enumerate(ends):
            with torch.enable_grad():
                result = next(results)
            logits = result.logits if hasattr(result, "logits") else result[0]
            check_finite(logits.detach(), "the logits", number)
            found.gradients.append(_loss_gradient(logits, hidden, batches[number], number * work.batch, work.settings))
    view.unload()
    give_back()
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
        logits: (samples, length, vocabulary).
        hidden: the leaf of autograd that the logits depend on.
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


def uniforms(seed: int, sample: int, length: int) -> Tensor:
    """The random numbers in [0, 1) that choose one sample's labels, (length,) float64; they do not depend on its batch."""
    return torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(derived_seed(seed, sample)))


def draw(p: Tensor, u: Tensor) -> Tensor:
    """The label at which the cumulative distribution of each row of `p` (rows, vocabulary) passes `u` (rows,)."""
    cumulative = p.double().cumsum(-1)
    labels = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return labels.clamp_max(p.shape[-1] - 1)


@dataclass(frozen=True)
class _LayerBack:
    """The way back through one layer.

    Args:
        layer: number `index`, its weights loaded.
        calls: per batch.
        gradients: per batch, with respect to the layer's output.
        spill: holds the layer's input.
    """

    work: GradientPass
    index: int
    layer: nn.Module
    calls: Sequence[_Rest]
    gradients: Sequence[Tensor]
    spill: Spill

    def run(self, targets: Sequence[Target], before: list[Tensor] | None = None) -> dict[str, TargetStats]:
        """Run the layer with autograd batch by batch.

        Args:
            targets: those whose gradients are collected.
            before: gets, per batch, the gradients with respect to the layer's input. It may be `gradients`: those with respect
                to the output are then replaced.

        Returns:
            target name -> its statistics.
        """
        devices, name = self.work.devices, self.work.view.layer_names[self.index]
        self.layer.requires_grad_(False)
        copies = copies_on(self.layer, devices)
        collectors = [self.work.collector(each, name, targets, device) for each, device in zip(copies, devices, strict=True)]

        def back(worker: int, batch: int) -> None:
            x = self.spill.get(self.index, batch, devices[worker]).requires_grad_()
            collectors[worker].expect(*x.shape[:2])
            with torch.enable_grad():
                output = run_layer(copies[worker], self.calls[batch].call(x))
            main = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
            (gradient,) = torch.autograd.grad(main, x, self.gradients[batch].to(main))
            if before is not None:
                before[batch] = _finite(gradient.cpu(), name)

        with ExitStack() as watching:
            for collector in collectors:
                watching.enter_context(collector)
            spread(len(self.calls), len(devices), back)
        return collectors[0].result(collectors[1:])


def _finite(gradient: Tensor, where: str) -> Tensor:
    if not torch.isfinite(gradient).all():
        bad = int((~torch.isfinite(gradient)).sum())
        raise NonFiniteError(
            f"{where}: {bad} of {gradient.numel()} gradients are not finite ({gradient.dtype}).",
            "Try --dtype bfloat16 or --dtype float32.",
        )
    return gradient
