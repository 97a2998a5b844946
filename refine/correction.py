"""Correction: fitting a layer's matrices to the inputs that they get in the compressed model, before they are compressed.

The original and the compressed model run layer by layer on the same tokens, so that a compressed layer can be compared with the
original's output:

* `correct` regresses every matrix on its inputs in the compressed model (`propagate: compressed` alone compresses the original
  matrix for these inputs): R = W (Ĉ + β D)(Ĉ + λ I)⁻¹ with Ĉ = E[x̂ x̂ᵀ] and D = E[(x - x̂) x̂ᵀ], x the original's input and x̂ the
  compressed model's (`regressed` explains where the ridge is added). β = 1 aims at the original's output, β = 0 at W x̂. The
  method then compresses R. For each layer the β, or no correction, with the least error on held-out tokens is chosen. Matrices
  that are kept dense are corrected too, which adds no bytes.
* `refine_block` (refine/objectives.py) trains the layer's stored parameters, its norms and its biases.

Source: the dual-input objective of AA-SVD (arXiv 2604.02119, theorem 3.2) and SAES-SVD (arXiv 2602.03051); choosing by held-out
block error, and "none" among the choices, is lrc's: independent reproductions (LowRankArena, arXiv 2608.26389) saw
such refits explode.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from ..model.layer_forms import target_weight
from ..model.lockstep import Call, hidden_of, run_layer
from ..model.targets import Target
from .objectives import BlockExamples


class CorrectionSpec(BaseModel):
    """Sequential correction: matrices are regressed on the inputs of the compressed model before they are compressed.

    Args:
        betas: how far towards the original's output; each is tried beside no correction, and held-out tokens choose per layer.
        damping: ridge added to the gram, relative to its mean diagonal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    betas: tuple[float, ...] = Field((0.5, 1.0), min_length=1)
    damping: float = Field(0.01, gt=0, le=1)

    @field_validator("betas")
    @classmethod
    def _parts(cls, betas: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [beta for beta in betas if not 0 < beta <= 1]:
            raise ValueError(f"must lie in (0, 1], not {wrong[0]:g}; no correction (0) is tried always")
        return betas


@dataclass(frozen=True)
class Pair:
    """The calls of one layer in both models, batch by batch; the last `held` of each are held out."""

    original: Sequence[Call]
    compressed: Sequence[Call]
    held: int

    @classmethod
    def of(cls, calls: Sequence[Call], held: int) -> Pair:
        """From all calls in a row: the original's, then the compressed model's."""
        count = len(calls) // 2
        return cls(calls[:count], calls[count:], held)

    @property
    def trained(self) -> int:
        """Batches that are not held out."""
        return len(self.original) - self.held

    def read(self, sequential: bool) -> tuple[Sequence[Call], Sequence[Call]]:
        """(The calls that statistics are taken from, the other calls for which the original layer's outputs are needed)."""
        if sequential:
            return self.compressed[: self.trained], self.original
        return self.original[: self.trained], self.original[self.trained :]

    def split(self, goals: Sequence[Tensor]) -> tuple[BlockExamples, BlockExamples]:
        """The compressed model's calls and their goals: (those to train on, those held out)."""
        at = self.trained
        return BlockExamples(self.compressed[:at], goals[:at]), BlockExamples(self.compressed[at:], goals[at:])


def cross_moments(
    layer: nn.Module, name: str, targets: Sequence[Target], pair: Pair, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Group -> (E[x̂ x̂ᵀ], E[(x - x̂) x̂ᵀ]), both (in, in) float64, over the batches that are not held out.

    Experts are left out: the two models send different tokens to them.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    tokens = 0
    with torch.no_grad():
        for one, two in zip(pair.original[: pair.trained], pair.compressed[: pair.trained], strict=True):
            with _inputs(layer, name, targets) as seen:
                run_layer(layer, one.to(device))
                before = dict(seen)
                seen.clear()
                run_layer(layer, two.to(device))
                after = dict(seen)
            count = next(iter(after.values())).shape[0] if after else 0
            for group, x_hat in after.items():
                gram = (x_hat.T @ x_hat).double()
                cross = ((before[group] - x_hat).T @ x_hat).double()
                held = found.get(group)
                found[group] = (gram, cross) if held is None else (held[0] + gram, held[1] + cross)
            tokens += count
    return {group: (gram / tokens, cross / tokens) for group, (gram, cross) in found.items()}


@contextmanager
def _inputs(layer: nn.Module, name: str, targets: Sequence[Target]) -> Iterator[dict[str, Tensor]]:
    """While the context is open, notes the input (tokens, in) float32 of every group whose targets are no experts."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        watched: set[str] = set()
        for target in targets:
            if target.expert is None and target.group not in watched:
                watched.add(target.group)
                module = layer.get_submodule(target.module.removeprefix(name + "."))

                def hook(module: nn.Module, args: tuple[Any, ...], group: str = target.group) -> None:
                    seen[group] = args[0].reshape(-1, args[0].shape[-1]).float()

                stack.callback(module.register_forward_pre_hook(hook).remove)
        yield seen


def regressed(weight: Tensor, gram: Tensor, cross: Tensor, beta: float, damping: float) -> Tensor:
    """`W + β W D (Ĉ + λ I)⁻¹` in float64, λ = damping · the mean of Ĉ's diagonal.

    `W (Ĉ + β D)(Ĉ + λ I)⁻¹` with the ridge on both sides: with β = 0 the regression of W x̂ on x̂ is W itself wherever x̂ has
    energy, and shrinking it would only lose.

    Args:
        weight: (out, in).
        gram, cross: (in, in) float64, Ĉ and D.
    """
    ridge = damping * float(gram.diagonal().mean())
    if ridge <= 0:
        return weight.double()
    damped = gram + ridge * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    factor = torch.linalg.cholesky(damped)
    change = torch.cholesky_solve((weight.double() @ cross).T, factor).T
    return weight.double() + beta * change


Solved = TypeVar("Solved")  # what compressing a layer in place gives


def correct(
    layer: nn.Module,
    name: str,
    targets: Sequence[Target],
    pair: Pair,
    goals: Sequence[Tensor],
    settings: CorrectionSpec | None,
    compress: Callable[[nn.Module], Solved],
) -> tuple[nn.Module, Solved, dict[str, Any]]:
    """Compress copies of a layer with and without correction, and keep the one nearest to the goals on held-out tokens.

    Args:
        layer: the original layer on its device; not changed.
        goals: the original layer's hidden states, of all batches.
        settings: which β to try; None: no correction at all.
        compress: compresses a layer in place: solves its targets and installs their forms.

    Returns:
        The compressed layer, what `compress` returned for it, and a record of which β was taken (None: no correction).
    """
    if settings is None:
        small = copy.deepcopy(layer)
        return small, compress(small), {}
    device = next(layer.parameters()).device
    moments = cross_moments(layer, name, targets, pair, device)
    _, held_out = pair.split(goals)
    best: tuple[float, nn.Module, Solved, dict[str, Any]] | None = None
    for beta in (None, *settings.betas):
        tried = copy.deepcopy(layer)
        if beta is not None:
            with torch.no_grad():
                for target in targets:
                    if target.group in moments:
                        weight, _ = target_weight(tried, name, target)
                        weight.copy_(regressed(weight, *moments[target.group], beta, settings.damping))
        solved = compress(tried)
        error = block_error(tried, held_out, device)
        if best is None or error < best[0]:
            best = error, tried, solved, {"correction": {"beta": beta, "held_out_error": error}}
    assert best is not None
    return best[1:]


@torch.no_grad()
def block_error(layer: nn.Module, examples: BlockExamples, device: torch.device) -> float:
    """Sum of squared differences between a layer's hidden states and the goals, float64."""
    outputs = (hidden_of(run_layer(layer, call.to(device))) for call in examples.calls)
    pairs = zip(outputs, examples.goals, strict=True)
    return math.fsum(float((y.cpu().double() - goal.double()).square().sum()) for y, goal in pairs)


def restored(layer: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer with its forms installed the stored values of all other tensors (norms and biases that were refined)."""
    state = layer.state_dict()
    with torch.no_grad():
        for key, value in tensors.items():
            held = state.get(key.removeprefix(name + "."))
            if held is not None and held.shape == value.shape:
                held.copy_(value)
