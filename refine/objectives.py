"""Refinement: training the parameters that a compressed model already stores towards the original; it adds no bytes.

`refine_block` trains one layer at a time to compute, from the compressed model's hidden state, the output that the original
layer has in the original model (AA-SVD, arXiv:2604.02119, and level 2 of three-level compression; plain squared error: cosine
losses inflate the factors' largest singular values). `refine_end_to_end` trains the factors of a whole model towards the
original's predicted distribution, which generalises better than the text's own next tokens. trainer.py takes the steps.

Trained parameters: every floating-point tensor of a form (factors, atoms, scales, biases), and in blocks all norms and biases
too; dense weights, routers and embeddings are not trained. A layer in bfloat16 is trained in bfloat16 with float32 masters of
the trained parameters, and judged by the rounded values, which are the ones that will be stored.

Memory of a block: the layer + 16 bytes per trained parameter (20 with masters) + one call's autograd graph, in addition to the
caller's examples. Time: about three forwards of the layer per token and epoch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..model.divergence import divergence
from ..model.events import Notify, silent
from ..model.lockstep import Call, run_layer
from .trainer import (
    Course,
    Refinement,
    Trainer,
    TrainingSettings,
    TrainingState,
    checked_dtypes,
    multiplying_in,
    trainable,
)


class BlockSettings(TrainingSettings):
    """Of `refine_block`; the held-out loss is evaluated after each epoch, and a step takes whole calls.

    Attributes:
        epochs: at most.
        epoch_tokens: tokens per epoch; with fewer than there are, successive epochs take different ones. None: all.
        loss: `variance`: squared error relative to the variance of the original's outputs; `token`: each token's relative to
            the mean square of its own output, so that a few tokens with huge outputs do not dominate; `mse`: the plain error.
    """

    epochs: int = Field(default=4, ge=1)
    epoch_tokens: int | None = Field(default=None, ge=1)
    loss: Literal["variance", "token", "mse"] = "variance"


class EndToEndSettings(TrainingSettings):
    """Of `refine_end_to_end`.

    Attributes:
        steps: at most.
        every: steps between two evaluations of the held-out loss.
        length: windows are cut into pieces of this many tokens, which makes attention cheaper; None: windows are not cut.
        vectors: whether norms and biases are trained too.
        gradient_checkpointing: run each layer again in the backward pass instead of keeping its activations: a third more
            time, and memory for the activations of one layer only.
    """

    lr: float = Field(default=2e-5, gt=0, allow_inf_nan=False)
    steps: int = Field(default=60, ge=1)
    every: int = Field(default=10, ge=1)
    length: int | None = Field(default=None, ge=2)
    vectors: bool = False
    gradient_checkpointing: bool = True


@dataclass(frozen=True)
class BlockExamples:
    """What a layer is called with, batch by batch, and the hidden states (samples, length, hidden) that it should put out."""

    calls: Sequence[Call]
    goals: Sequence[Tensor]

    @property
    def tokens(self) -> list[int]:
        """How many tokens each batch has."""
        return [goal.numel() // goal.shape[-1] for goal in self.goals]


def refine_block(
    layer: nn.Module,
    examples: BlockExamples,
    held_out: BlockExamples,
    settings: BlockSettings,
    notify: Notify = silent,
    everything: bool = False,
) -> Refinement:
    """Train a compressed layer towards the original layer's outputs; it ends in its best state, without gradients.

    Args:
        layer: with its forms installed, on its device.
        examples: the compressed model's calls of the layer; their goals are the original layer's outputs in the original model.
        held_out: the same of other text, which decides when to stop and what to keep.
        notify: is told of each epoch and its held-out loss.
        everything: train dense weights too (a layer that is to replace a run of layers).

    Raises:
        NonFiniteError: the held-out loss is not finite before the first step.
        RequestError: a trained parameter is in float16.
    """
    if not examples.calls or not held_out.calls:
        raise ValueError("refinement needs calls to train on and calls to judge by")
    started = time.perf_counter()
    scale = _variance(examples.goals) if settings.loss == "variance" else 1.0
    tokens, held_tokens = examples.tokens, sum(held_out.tokens)

    def judge() -> float:
        with torch.no_grad():
            pairs = zip(held_out.calls, held_out.goals, strict=True)
            return math.fsum(float(_block_error(layer, *pair, settings)) for pair in pairs) / scale / held_tokens

    def backward(index: int, total: int) -> float:
        loss = _block_error(layer, examples.calls[index], examples.goals[index], settings) / (scale * total)
        loss.backward()
        return loss.item()

    per_call = sum(tokens) / len(tokens)
    per_step = max(1, round(settings.batch_tokens / per_call))
    epoch = min(settings.epoch_tokens or sum(tokens), sum(tokens))
    steps = max(1, round(epoch / (per_step * per_call)))
    layer.requires_grad_(False)
    found = checked_dtypes(dict(layer.named_parameters())) if everything else trainable(layer, vectors=True)
    trainer = Trainer(list(found.values()), settings, steps * settings.epochs)
    return trainer.run(Course(backward, tokens, per_step, steps, judge, started), notify)


def _block_error(layer: nn.Module, call: Call, target: Tensor, settings: BlockSettings) -> Tensor:
    """Sum over a call's tokens of the mean squared error over channels, each token's relative to its own square for `token`."""
    device = next(layer.parameters()).device
    with multiplying_in(settings.precision, device):
        output = run_layer(layer, call.to(device))
    hidden = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
    wide = torch.promote_types(hidden.dtype, torch.float32)
    wanted = target.to(device, wide)
    each = (hidden.to(wide) - wanted).square().mean(-1)
    if settings.loss == "token":
        each = each / wanted.square().mean(-1).clamp_min(torch.finfo(wide).tiny)
    return each.sum()


@dataclass(frozen=True)
class Teaching:
    """The text that a whole model is trained on, and the predictions that it is trained towards.

    Args:
        batches: token ids to train on, (samples, length) each.
        held_out: token ids of other text, which decides when to stop and what to keep.
        teacher: token ids -> the original's logits (samples, length, words), in any dtype and on any device; called for every
            batch of every step, so the caller chooses whether logits are computed or read.
    """

    batches: Sequence[Tensor]
    held_out: Sequence[Tensor]
    teacher: Callable[[Tensor], Tensor]


def refine_end_to_end(
    model: nn.Module,
    layers: Sequence[nn.Module],
    teaching: Teaching,
    settings: EndToEndSettings,
    notify: Notify = silent,
    resume: TrainingState | None = None,
    keep: Callable[[TrainingState], None] = lambda state: None,
) -> Refinement:
    """Train the forms of a whole model towards the original's next-token distribution, KL(original ‖ compressed) in nats.

    Args:
        model: a compressed causal language model of transformers in evaluation mode, with its weights.
        layers: its decoder layers; with gradient checkpointing each runs again in the backward pass.
        teaching: the text, and the original's predictions.
        notify: is told of each evaluation and its held-out loss.
        resume: the last state of an interrupted refinement of the same model.
        keep: called with the state after every evaluation of the held-out loss.

    Raises:
        NonFiniteError: the held-out loss is not finite before the first step.
        RequestError: a trained parameter is in float16.
    """
    batches, held_out = teaching.batches, teaching.held_out
    if not batches or not held_out:
        raise ValueError("refinement needs batches to train on and batches to judge by")
    started, device = time.perf_counter(), next(model.parameters()).device

    def compared(ids: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None, float]:
        with torch.no_grad():
            wanted = teaching.teacher(ids)
        with multiplying_in(settings.precision, device):
            logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
        slope = torch.empty_like(logits) if gradient else None
        changed, along = logits.detach().flatten(0, -2), None if slope is None else slope.flatten(0, -2)
        return logits, slope, divergence(wanted.flatten(0, -2), changed, along)

    def judge() -> float:
        with torch.no_grad():
            return math.fsum(compared(ids, False)[2] for ids in held_out) / sum(ids.numel() for ids in held_out)

    def backward(index: int, total: int) -> float:
        logits, slope, loss = compared(batches[index], True)
        assert slope is not None
        logits.backward(slope.div_(total))
        return loss / total

    tokens = [ids.numel() for ids in batches]
    per_step = max(1, round(settings.batch_tokens * len(tokens) / sum(tokens)))
    model.requires_grad_(False)
    trainer = Trainer(list(trainable(model, settings.vectors).values()), settings, settings.steps, resume)
    with _checkpointed(layers if settings.gradient_checkpointing else []):
        return trainer.run(Course(backward, tokens, per_step, settings.every, judge, started), notify, keep)


def _variance(targets: Sequence[Tensor]) -> float:
    """Mean over features of the variance over all tokens, in float64."""
    tokens, total, squares = 0, torch.zeros(()), 0.0
    for target in targets:
        flat = target.reshape(-1, target.shape[-1])
        tokens += len(flat)
        total = total.to(flat.device) + flat.sum(0, dtype=torch.float64)
        squares += float(flat.double().square().sum())
    width = targets[0].shape[-1]
    variance = (squares - float(total.square().sum()) / tokens) / (tokens * width)
    return max(variance, torch.finfo(torch.float32).tiny)


@contextlib.contextmanager
def _checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While the context is open, the layers keep no activations: they run again in a backward pass.

    transformers' own switch needs training mode, which also turns dropout on.
    """
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
