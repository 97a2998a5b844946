"""Importance scores of targets that some allocation rules use in addition to losses.

components      ΔL_i = -⟨∂L/∂W, component i⟩ for every component of the factors, in descending order of σ, nats per token
effective-rank  exp(H(p)), p the shares of the components in the target's output energy
angular         the mean angle by which the target's layer turns the hidden state, in units of π; calibration tokens
tokens          0; calibration tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate.layerwise import run_batches, through_layers
from ...compress.base import LowRankSolution, Solution, TargetStats
from ...compress.forms.base import LowRank
from ...compress.options import Choice
from ...model.lockstep import Call, hidden_of
from ...model.view import ModelView

_LOOKED_AT = 8192  # number of tokens for the comparison of layers


def of_target(score: str, solution: Solution, stats: TargetStats, shape: tuple[int, int], angle: float) -> tuple[float, ...]:
    """The scores of one target.

    Args:
        score: one of the scores above; '' for no score.
        solution: the target's solution.
        stats: the target's statistics; 'components' needs `weight_grad`.
        shape: (out, in) of its weight.
        angle: the result of `layer_angles` for the target's layer.
    """
    if score == "components":
        if stats.weight_grad is None:
            raise ValueError("first-order changes need the mean gradient of the weight")
        form = solution.form(Choice(rank=min(shape)))
        assert isinstance(form, LowRank)
        return tuple(first_order(form.left, form.right, stats.weight_grad).tolist())
    if score == "effective-rank":
        assert isinstance(solution, LowRankSolution)
        return (effective_rank(solution.energy),)
    return (angle, float(stats.group.tokens)) if score in ("angular", "tokens") else ()


def first_order(left: Tensor, right: Tensor, gradient: Tensor) -> Tensor:
    """-leftᵢᵀ G rightᵢ for every i: the first-order change of the loss when component i is removed, (k,) float64.

    Args:
        left: (out, k); right: (k, in); gradient: (out, in) ∂loss/∂W.
    """
    return -((left.double().T @ gradient.double()) * right.double()).sum(1)


def effective_rank(energy: Tensor) -> float:
    """exp of the entropy of energy (k,) divided by its sum; 1 where the sum is zero (Roy and Vetterli 2007; D-Rank)."""
    total = float(energy.sum())
    if total <= 0:
        return 1.0
    shares = energy.double() / total
    return math.exp(float(-torch.special.xlogy(shares, shares).sum()))


def layer_angles(view: ModelView, tokens: Tensor, device: torch.device) -> list[float]:
    """Mean angle between the hidden states before and after each layer, over all tokens, divided by π.

    Args:
        tokens: (samples, length); evenly spaced samples with about 8,000 tokens at most are used.
    """
    samples = max(1, min(len(tokens), _LOOKED_AT // tokens.shape[1]))
    chosen = tokens[[number * len(tokens) // samples for number in range(samples)]]
    found: list[float] = []

    def visit(index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any]:
        outputs = run_batches(layer, name, calls, [device])[0]
        angles = [
            torch.arccos(torch.cosine_similarity(call.hidden.double().cpu(), hidden_of(output).double(), dim=-1).clamp(-1, 1))
            for call, output in zip(calls, outputs, strict=True)
        ]
        found.append(float(torch.cat([angle.flatten() for angle in angles]).mean()) / math.pi)
        return outputs

    with torch.no_grad():
        through_layers(view, chosen.split(1), visit)
    return found
