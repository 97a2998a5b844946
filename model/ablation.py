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
from .layer_edit import LayerEdit, edited
from .layerwise import LayerTurn, layerwise
from .likelihood import makes_few_logits
from .lockstep import Call, run_calls
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
    count = len(variants)
    same = [0] * count  # variants with equal numbers have had the same changes so far
    with layerwise(view, [ids for ids in batches for _ in variants], more) as forward:
        for turn in forward:
            kinds = [(same[number], variant.at(turn.index)) for number, variant in enumerate(variants)]
            turn.answer(_outputs(turn, kinds, device))
            numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
            same = [numbers[kind] for kind in kinds]
        for place, result in enumerate(forward.results()):
            yield place % count, batches[place // count], result.logits


Kind = tuple[int, LayerEdit | str | None]  # of a variant at a layer: (number of its changes so far, what the layer is in it)


def _outputs(turn: LayerTurn, kinds: Sequence[Kind], device: torch.device) -> list[Any]:
    """The layer's output for every call: every batch, and in it every variant; computed once for all variants of one kind."""
    outputs: list[Any] = [None] * len(turn.calls)
    alike: dict[Kind, list[int]] = {}
    for number, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(number)

    def calls(members: Sequence[int]) -> list[Call]:
        return turn.calls[members[0] :: len(kinds)]

    def give(members: Sequence[int], found: Sequence[Any]) -> None:
        for number in members:
            outputs[number :: len(kinds)] = found

    for (_, change), members in alike.items():
        if isinstance(change, str):
            give(members, turn.passed_by(calls(members)))
    if all(isinstance(change, str) for _, change in alike):
        return outputs
    with turn.loaded(device) as layer:
        for (_, change), members in alike.items():
            if not isinstance(change, str):
                with edited(layer, turn.name, change):
                    give(members, run_calls(layer, turn.name, calls(members), device))
    return outputs
