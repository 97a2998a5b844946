"""How far a compressed model's predictions are from the original's, on windows that no statistic saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...calibrate.layerwise import run_batches
from ...model.divergence import divergence
from ...model.layerwise import LayerwiseForward, layerwise
from ...model.machine.host_memory import steady_memory
from ...model.machine.precision import full_precision
from ...model.view import ModelView
from ...refine.end_to_end import from_hidden

_AT_ONCE = 2**24  # number of logits that are computed at a time


@dataclass(frozen=True)
class Measured:
    """A compressed model beside the original, in nats per token.

    Args:
        divergence: KL(original ‖ compressed).
        before, after: cross-entropy of both.
        tokens: how many were predicted.
    """

    divergence: float
    before: float
    after: float
    tokens: int


@full_precision
def last_states(view: ModelView, windows: Tensor, devices: Sequence[torch.device]) -> list[Tensor]:
    """The decoder's last hidden states of each window, (1, length, hidden) each, on the CPU.

    Args:
        view: any model that lrc reads.
        windows: (windows, length) int64 token ids.
    """
    steady_memory()
    with torch.no_grad(), layerwise(view, windows.split(1), head=False) as forward:
        return _states(forward, devices)


@full_precision
def measured(view: ModelView, windows: Tensor, original: Sequence[Tensor], devices: Sequence[torch.device]) -> Measured:
    """Compare a compressed model with the original.

    Args:
        view: the compressed model; its output head is the original's.
        windows: (windows, length) int64 token ids.
        original: `last_states` of the original on the same windows.
    """
    steady_memory()
    count = max(1, _AT_ONCE // view.config.get_text_config().vocab_size)
    far = before = after = 0.0
    with torch.no_grad(), layerwise(view, windows.split(1), head=False) as forward:
        for ids, first, other in zip(windows.split(1), original, _states(forward, devices), strict=True):
            for start in range(0, ids.shape[1] - 1, count):
                part = slice(start, min(start + count, ids.shape[1] - 1))
                true, mine = (from_hidden(view.model, ids[:, part], each[:, part])[0].float() for each in (first, other))
                following = ids[0, part.start + 1 : part.stop + 1]
                far += divergence(true, mine)
                before += float(cross_entropy(true, following, reduction="none").double().sum())
                after += float(cross_entropy(mine, following, reduction="none").double().sum())
    tokens = windows.numel() - len(windows)
    return Measured(far / tokens, before / tokens, after / tokens, tokens)


def _states(forward: LayerwiseForward, devices: Sequence[torch.device]) -> list[Tensor]:
    for turn in forward:
        with turn.loaded() as layer:
            turn.answer(run_batches(layer, turn.name, turn.calls, devices)[0])
    results: Any = forward.results()
    return [result.last_hidden_state for result in results]
