"""What a model loses with some layers or sub-layers gone or changed: many such variants in one pass over the weights.

Every variant is the model with its own layers dropped and edited. Variants go through the layers in lockstep, each layer's
weights are read once for all of them, and as long as two variants have met the same changes they are one computation. Only so
many go through together that their hidden states stay within `STATES` bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import NonFiniteError
from .divergence import Predictions
from .host_memory import give_back
from .layer_edit import LayerEdit, edited
from .likelihood import makes_few_logits
from .lockstep import Call, Lockstep, check_finite, on_host, passed_by, run_layer, with_hidden
from .sublayers import SubLayer
from .view import ModelView

# Variants of a model go through the layers side by side, and the plan knows what they take.
STATES = 2 << 30  # bytes of hidden states of those that go together
COPIES = 4  # of a hidden state that live at once: the embedding, a layer's input, its output, and what a forward keeps
BATCH_TOKENS = 512  # of one forward of a variant, unless one window is longer: logits are held for so many

SKIP = 16  # first tokens of each window, whose predictions have little to go by


@dataclass(frozen=True)
class Variant:
    """A model with something changed.

    Args:
        dropped: layers that are passed by.
        edits: layer -> what is changed in it.
    """

    dropped: frozenset[int] = frozenset()
    edits: Mapping[int, LayerEdit] = field(default_factory=dict)

    def at(self, layer: int) -> LayerEdit | str | None:
        """What a layer is in this variant; equal for two variants that treat it alike."""
        return "dropped" if layer in self.dropped else self.edits.get(layer)


class WithoutSubLayers:
    """Variants of a model that lack some of its sub-layers; equal edits are one object, so that variants share what they can.

    Args:
        sublayers: of the model, by number.
    """

    def __init__(self, sublayers: Sequence[SubLayer]) -> None:
        self._sublayers = sublayers
        self._edits: dict[frozenset[int], LayerEdit] = {}

    def __call__(self, parts: Collection[int]) -> Variant:
        """The model without the sub-layers of these numbers."""
        by_layer: dict[int, set[int]] = {}
        for part in parts:
            by_layer.setdefault(self._sublayers[part].layer, set()).add(part)
        return Variant(edits={layer: self._edit(frozenset(mine)) for layer, mine in by_layer.items()})

    def _edit(self, mine: frozenset[int]) -> LayerEdit:
        if mine not in self._edits:
            self._edits[mine] = reduce(LayerEdit.with_others, (self._sublayers[part].zeroed for part in sorted(mine)))
        return self._edits[mine]


def scored(model: nn.Module, tokens: Tensor) -> tuple[int, dict[str, int]]:
    """How many of each window's last tokens count where predictions are compared, and the arguments with which a model's
    forward makes no other logits, if it can.

    Args:
        tokens: (windows, length) token ids.
    """
    count = tokens.shape[1] - min(SKIP, tokens.shape[1] // 2)
    return count, {"logits_to_keep": count} if makes_few_logits(model) else {}


def losses(view: ModelView, tokens: Tensor, variants: Sequence[Variant], device: torch.device) -> list[float]:
    """Mean negative log likelihood of the tokens under each variant, in nats per predicted token.

    Args:
        tokens: (windows, length) token ids, without padding; each but a window's first is predicted.
        device: where layers run.
    """
    found = [0.0] * len(variants)
    for chunk in _chunks(len(variants), together(view, tokens)):
        for number, ids, logits in _predictions(view, tokens, [variants[i] for i in chunk], device):
            nll = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            found[chunk[number]] += float(nll)
    return _finite([total / (tokens.shape[0] * (tokens.shape[1] - 1)) for total in found])


def divergences(view: ModelView, tokens: Tensor, variants: Sequence[Variant], device: torch.device) -> list[float]:
    """Kullback-Leibler divergence of each variant's predictions from the whole model's, in nats per token; as `losses`."""
    found = [0.0] * len(variants)
    count, only = scored(view.model, tokens)
    for chunk in _chunks(len(variants), together(view, tokens) - 1):
        original: Predictions | None = None
        for number, _, logits in _predictions(view, tokens, [Variant(), *(variants[i] for i in chunk)], device, only):
            words = logits[:, -count:]
            if number == 0 or original is None:
                original = Predictions(words)  # of this batch
            else:
                found[chunk[number - 1]] += original.divergence(words)
    return _finite([max(total / (tokens.shape[0] * count), 0.0) for total in found])


def _chunks(count: int, most: int) -> list[range]:
    return [range(first, min(first + most, count)) for first in range(0, count, most)]


def _finite(found: list[float]) -> list[float]:
    if not all(math.isfinite(each) for each in found):
        raise NonFiniteError(
            f"The loss of {sum(not math.isfinite(each) for each in found)} of {len(found)} models with parts taken out is no "
            "number.",
            "In float16 logits can overflow: try --dtype bfloat16 or float32.",
        )
    return found


def together(view: ModelView, tokens: Tensor) -> int:
    """How many variants go through the layers side by side: their hidden states stay within `STATES` bytes."""
    hidden = view.config.get_text_config().hidden_size
    return max(2, STATES // (COPIES * tokens.numel() * hidden * view.dtype.itemsize))


@torch.no_grad()
def _predictions(
    view: ModelView, tokens: Tensor, variants: Sequence[Variant], device: torch.device, more: Mapping[str, int] | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number of the variant, token ids of a batch, their logits), batch after batch and in each variant after variant.

    Args:
        more: arguments of the model's forward.
    """
    batches = tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))
    count, last = len(variants), len(view.layers) - 1
    same = [0] * count  # variants of equal numbers have met the same changes so far
    view.load_outside()
    with Lockstep(view.model, view.layers) as steps:
        steps.start([{"input_ids": ids, **(more or {})} for ids in batches for _ in variants])
        view.unload()
        give_back()
        for index, name in enumerate(view.layer_names):
            kinds = list(dict.fromkeys((same[number], variant.at(index)) for number, variant in enumerate(variants)))
            leaders = [next(n for n, variant in enumerate(variants) if (same[n], variant.at(index)) == kind) for kind in kinds]
            template = passed_by(view.layers[index], steps.calls[0])
            outputs: list[Any] = [None] * len(steps.calls)
            if any(kind[1] != "dropped" for kind in kinds):
                view.load(name).to(device)
            for kind, leader in zip(kinds, leaders, strict=True):
                members = [n for n, variant in enumerate(variants) if (same[n], variant.at(index)) == kind]
                calls = [steps.calls[batch * count + leader] for batch in range(len(batches))]
                for batch, output in enumerate(_through(view.layers[index], name, kind[1], calls, template, device)):
                    for number in members:
                        outputs[batch * count + number] = output
            same = [kinds.index((same[number], variant.at(index))) for number, variant in enumerate(variants)]
            view.unload(name)
            give_back()
            if index < last:
                steps.answer(outputs)
                del outputs
        view.load_end()
        for place, result in enumerate(steps.finish(outputs)):
            yield place % count, batches[place // count], result.logits
    view.unload()


def _through(
    layer: nn.Module,
    name: str,
    how: LayerEdit | str | None,
    calls: Sequence[Call],
    template: Any,
    device: torch.device,
) -> Iterator[Any]:
    if isinstance(how, str):
        yield from (with_hidden(template, call.hidden) for call in calls)
        return
    with edited(layer, name, how):
        for batch, call in enumerate(calls):
            output = run_layer(layer, call.to(device))
            check_finite(output, name, batch)
            yield on_host(output)
