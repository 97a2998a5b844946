"""Ablations: the loss of a model without some layers or sub-layers, or with edits; many of them in one pass over the weights.

All ablations run layer by layer together, so that each layer's weights are read once for all of them. Two ablations with the
same changes in all layers so far share one computation. The number of ablations in a pass is limited so that their hidden
states take at most `STATES` bytes.
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

# The plan computes the memory of ablations from these three.
STATES = 2 << 30  # bytes of hidden states of the ablations in one pass
COPIES = 4  # copies of a hidden state in memory at once: the embedding, a layer's input, its output, and one inside a forward
BATCH_TOKENS = 512  # tokens in one batch of an ablation, unless one window is longer: the logits of a batch are held at once

SKIP = 16  # first tokens of each window that are not compared: their predictions have little context


@dataclass(frozen=True)
class Ablation:
    """A model without some layers, or with edited ones; without arguments it is the model itself.

    Args:
        dropped: layers that do nothing: the hidden state skips them.
        edits: layer -> what is changed in it.
    """

    dropped: frozenset[int] = frozenset()
    edits: Mapping[int, LayerEdit] = field(default_factory=dict)

    def at(self, layer: int) -> LayerEdit | str | None:
        """What is done to a layer: 'dropped', an edit, or None; equal for two ablations that do the same to it."""
        return "dropped" if layer in self.dropped else self.edits.get(layer)


class WithoutSubLayers:
    """Makes ablations without some sub-layers. Equal edits are one object, so that ablations share their computations.

    Args:
        sublayers: all sub-layers of the model; their places in the list are their numbers.
    """

    def __init__(self, sublayers: Sequence[SubLayer]) -> None:
        self._sublayers = sublayers
        self._edits: dict[frozenset[int], LayerEdit] = {}

    def __call__(self, numbers: Collection[int]) -> Ablation:
        """The model without the sub-layers with these numbers."""
        by_layer: dict[int, set[int]] = {}
        for number in numbers:
            by_layer.setdefault(self._sublayers[number].layer, set()).add(number)
        return Ablation(edits={layer: self._edit(frozenset(mine)) for layer, mine in by_layer.items()})

    def _edit(self, mine: frozenset[int]) -> LayerEdit:
        if mine not in self._edits:
            self._edits[mine] = reduce(LayerEdit.with_others, (self._sublayers[number].zeroed for number in sorted(mine)))
        return self._edits[mine]


def scored(model: nn.Module, tokens: Tensor) -> tuple[int, dict[str, int]]:
    """(How many of each window's last tokens are compared, arguments that make a forward compute logits of these only).

    The arguments are empty where the model's forward cannot be told for which tokens to compute logits.

    Args:
        tokens: (windows, length) token ids.
    """
    count = tokens.shape[1] - min(SKIP, tokens.shape[1] // 2)
    return count, {"logits_to_keep": count} if makes_few_logits(model) else {}


def losses(view: ModelView, tokens: Tensor, ablations: Sequence[Ablation], device: torch.device) -> list[float]:
    """Mean negative log likelihood of the tokens under each ablation, in nats per predicted token.

    Args:
        tokens: (windows, length) token ids, without padding; every token except a window's first is predicted.
        device: where layers run.

    Raises:
        NonFiniteError: a loss or a layer's output is not finite.
    """
    found = [0.0] * len(ablations)
    for chunk in _chunks(len(ablations), together(view, tokens)):
        for number, ids, logits in _predictions(view, tokens, [ablations[i] for i in chunk], device):
            nll = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            found[chunk[number]] += float(nll)
    return _finite([total / (tokens.shape[0] * (tokens.shape[1] - 1)) for total in found])


def divergences(view: ModelView, tokens: Tensor, ablations: Sequence[Ablation], device: torch.device) -> list[float]:
    """Kullback-Leibler divergence of each ablation's predictions from the whole model's, nats per token; as `losses`."""
    found = [0.0] * len(ablations)
    count, only = scored(view.model, tokens)
    for chunk in _chunks(len(ablations), together(view, tokens) - 1):
        original: Predictions | None = None
        for number, _, logits in _predictions(view, tokens, [Ablation(), *(ablations[i] for i in chunk)], device, only):
            words = logits[:, -count:]
            if number == 0 or original is None:
                original = Predictions(words)  # the whole model's predictions of this batch
            else:
                found[chunk[number - 1]] += original.divergence(words)
    return _finite([max(total / (tokens.shape[0] * count), 0.0) for total in found])


def _chunks(count: int, most: int) -> list[range]:
    return [range(first, min(first + most, count)) for first in range(0, count, most)]


def _finite(found: list[float]) -> list[float]:
    if not all(math.isfinite(each) for each in found):
        raise NonFiniteError(
            f"The loss of {sum(not math.isfinite(each) for each in found)} of {len(found)} models without some layers or "
            "sub-layers is not finite.",
            "In float16 logits can overflow: try --dtype bfloat16 or float32.",
        )
    return found


def together(view: ModelView, tokens: Tensor) -> int:
    """How many ablations run in one pass, so that their hidden states take at most `STATES` bytes; at least 2."""
    hidden = view.config.get_text_config().hidden_size
    return max(2, STATES // (COPIES * tokens.numel() * hidden * view.dtype.itemsize))


@torch.no_grad()
def _predictions(
    view: ModelView,
    tokens: Tensor,
    ablations: Sequence[Ablation],
    device: torch.device,
    options: Mapping[str, int] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number of the ablation, token ids of a batch, their logits): all ablations of the first batch, then of the next one.

    Args:
        options: more arguments of the model's forward.
    """
    batches = tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))
    count = len(ablations)
    same = [0] * count  # ablations with equal numbers have had the same changes so far
    with layerwise(view, [ids for ids in batches for _ in ablations], options) as forward:
        for turn in forward:
            kinds = [(same[number], ablation.at(turn.index)) for number, ablation in enumerate(ablations)]
            turn.answer(_outputs(turn, kinds, device))
            numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
            same = [numbers[kind] for kind in kinds]
        for place, result in enumerate(forward.results()):
            yield place % count, batches[place // count], result.logits


Kind = tuple[int, LayerEdit | str | None]  # of an ablation at a layer: (number of its changes so far, `Ablation.at`)


def _outputs(turn: LayerTurn, kinds: Sequence[Kind], device: torch.device) -> list[Any]:
    """The layer's output for every call (all ablations of the first batch, ...), computed once for ablations of one kind."""
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
