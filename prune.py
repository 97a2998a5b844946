"""Which layers go: a score's question to the original model, asked with a few calibration tokens.

The answer is part of the plan. From there on the model simply has fewer layers: statistics of what stays are taken without
those that go, and the artifact is renumbered (run.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate.stream import Call, hidden_of
from .depth.base import get_score
from .model import ModelView
from .passes import run_batches, through_layers
from .recipe import DepthSpec, how_many

MOST_TOKENS = 8192  # of all boundaries held at once: (layers + 1) × tokens × hidden × 4 bytes


def layers_to_drop(view: ModelView, spec: DepthSpec, tokens: Tensor, devices: Sequence[torch.device]) -> tuple[int, ...]:
    """The layers that go, ascending.

    Args:
        tokens: (samples, length) calibration tokens; a part of them is enough.
    """
    score, total = get_score(spec.score), len(view.layers)
    count = how_many(spec, total)
    candidates = range(spec.protect_first, total - spec.protect_last)
    boundaries = _boundaries(view, tokens, devices) if score.looks else []
    return tuple(score.choose(boundaries, candidates, count))


def _boundaries(view: ModelView, tokens: Tensor, devices: Sequence[torch.device]) -> list[Tensor]:
    """Hidden states (samples, length, hidden) before the first layer and after every layer, float32."""
    samples = max(1, min(len(tokens), MOST_TOKENS // tokens.shape[1]))
    chosen = tokens[[number * len(tokens) // samples for number in range(samples)]]
    found: list[Tensor] = []

    def visit(index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any]:
        if not found:
            found.append(torch.cat([call.hidden.float().cpu() for call in calls]))
        outputs = run_batches(layer, name, calls, devices)[0]
        found.append(torch.cat([hidden_of(output).float() for output in outputs]))
        return outputs

    with torch.no_grad():
        through_layers(view, chosen.split(1), visit)
    return found
