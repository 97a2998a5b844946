"""Refinement: training what a compressed model already stores, against the original, so that it costs no byte.

`refine_block` trains one layer at a time to give, from the compressed model's hidden state, what the original layer gave from
the original's (AA-SVD, arXiv:2604.02119, and level 2 of three-level compression; plain squared error: cosine losses inflate the
factors' largest singular values). `refine_end_to_end` trains the factors of a whole model towards the original's
distribution, which generalises better than the text's own next tokens. Both stop early on data that they do not train on, and
leave the state that was best there: never worse than where they started. Nothing here touches a disk.

What is trained: every floating-point tensor of a form (factors, atoms, scales, biases), and in blocks all norms and biases too;
dense weights, routers and embeddings stay. A layer in bfloat16 is trained in bfloat16 with float32 masters of what is trained,
and is judged by the rounded values, which are those that will be stored.

Memory of a block: the layer + 16 bytes per trained parameter (20 with masters) + one call's autograd graph, beside the caller's
calls and targets. Time: about three forwards of the layer per token and epoch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .calibrate.stream import Call, run_layer
from .compress import forms
from .compress.base import Settings
from .errors import NonFiniteError, RequestError

FINAL_LR = 0.1  # of the peak, at the end of the cosine
_TRAINED = (torch.bfloat16, torch.float32, torch.float64)
_LOGITS_AT_ONCE = 1 << 24  # widened to float32 together


class BlockSettings(Settings):
    """Of `refine_block`.

    Attributes:
        lr: peak of AdamW's learning rate.
        epochs: at most.
        batch_tokens: tokens per step; a call is never divided.
        epoch_tokens: tokens per epoch; fewer than there are means that each epoch sees another part of them. None: all.
        patience: epochs without a better held-out loss before stopping.
        weight_decay: of AdamW.
        warmup: share of all steps in which the learning rate rises; then it falls in a cosine to a tenth.
        clip: largest norm of a step's gradient.
        loss: `variance`: squared error relative to the variance of the original's outputs; `token`: each token's relative to
            the mean square of its own output, so that a few huge tokens do not decide; `mse`: as it is.
        precision: as in `EndToEndSettings`.
        seed: of the order of the calls.
        precision: as in `EndToEndSettings`.
    """

    lr: float = Field(default=1e-4, gt=0)
    epochs: int = Field(default=4, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    epoch_tokens: int | None = Field(default=None, ge=1)
    patience: int = Field(default=2, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    loss: Literal["variance", "token", "mse"] = "variance"
    precision: Literal["model", "bfloat16"] = "model"
    seed: int = 0


class EndToEndSettings(Settings):
    """Of `refine_end_to_end`; the names mean what they mean in `BlockSettings`.

    Attributes:
        steps: at most.
        every: steps between two looks at the held-out loss.
        patience: looks without a better held-out loss before stopping.
        length: windows are cut into pieces of so many tokens, which costs less attention; None: as they are.
        vectors: whether norms and biases are trained too.
        precision: `bfloat16` multiplies in bfloat16 whatever the model's dtype is (weights and sums stay in theirs), which is
            several times as fast where the processor has the instructions; `model`: in the model's own.
        gradient_checkpointing: run each layer anew in the backward pass instead of keeping its activations: a third more
            time, and memory for the activations of one layer only.
    """

    lr: float = Field(default=2e-5, gt=0)
    steps: int = Field(default=60, ge=1)
    batch_tokens: int = Field(default=8192, ge=1)
    every: int = Field(default=10, ge=1)
    patience: int = Field(default=2, ge=1)
    length: int | None = Field(default=None, ge=2)
    vectors: bool = False
    precision: Literal["model", "bfloat16"] = "model"
    gradient_checkpointing: bool = True
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    seed: int = 0


@dataclass(frozen=True)
class TrainingState:
    """Where a refinement stands, from which it goes on after a kill.

    Args:
        start, best: held-out losses.
        steps, looks, since: taken so far; looks since the best one.
        tensors: 'best.N', 'master.N', 'mean.N', 'square.N' of the N-th parameter.
    """

    start: float
    best: float
    steps: int
    looks: int
    since: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Refinement:
    """What a refinement did.

    Args:
        start, best: held-out loss before and after; the same where nothing helped, and then nothing has changed.
        steps: optimizer steps taken.
        seconds: of wall time.
        parameters: how many were trained.
        stopped: why it ended: 'done', 'early' (patience), 'diverged' (the training loss was no number), 'nothing to train'.
    """

    start: float
    best: float
    steps: int
    seconds: float
    parameters: int
    stopped: str


def trainable(module: nn.Module, vectors: bool) -> dict[str, nn.Parameter]:
    """The parameters that refinement trains, by name: those of forms, and with `vectors` all norms and biases.

    Raises:
        RequestError: some are in float16, whose range gradients leave.
    """
    found = {}
    inside = forms.__name__.rpartition(".")[0] + "."
    for path, child in module.named_modules():
        if type(child).__module__.startswith(inside):
            found.update({f"{path}.{name}" if path else name: p for name, p in child.named_parameters()})
    if vectors:
        found.update({name: p for name, p in module.named_parameters() if p.ndim == 1})
    return checked_dtypes(found)


def checked_dtypes(found: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of the parameters that can be trained.

    Raises:
        RequestError: some are in float16, whose range gradients leave.
    """
    for name, parameter in found.items():
        if parameter.dtype == torch.float16:
            raise RequestError(f"{name} is in float16, in which gradients underflow.", "Add --dtype bfloat16 or float32.")
    return {name: p for name, p in found.items() if p.dtype in _TRAINED and p.numel()}


def refine_block(
    layer: nn.Module,
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    held_calls: Sequence[Call],
    held_targets: Sequence[Tensor],
    settings: BlockSettings,
    notify: Callable[[int, float], None] = lambda epoch, loss: None,
    everything: bool = False,
) -> Refinement:
    """Train a compressed layer towards the original layer's outputs; it is left in its best state, without gradients.

    Args:
        layer: with its forms in place, on its device.
        calls: what the layer is called with, batch by batch, the hidden state being the compressed model's.
        targets: the original layer's hidden states, (samples, length, hidden) each, as the original model has them.
        held_calls, held_targets: the same of other text, which decides when to stop and what to keep.
        notify: called with (epoch, held-out loss).
        everything: train dense weights too (a layer that is to stand in for others).

    Raises:
        NonFiniteError: the held-out loss is no number before the first step.
        RequestError: float16.
    """
    if not calls or not held_calls:
        raise ValueError("refinement needs calls to train on and calls to judge by")
    started, device = time.perf_counter(), next(layer.parameters()).device
    scale = _variance(targets) if settings.loss == "variance" else 1.0

    def error(call: Call, target: Tensor) -> Tensor:
        """Sum over the call's tokens of the mean squared error, relative as the settings say."""
        with _multiplying_in(settings.precision, device):
            output = run_layer(layer, call.to(device))
        hidden = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = target.to(device, wide)
        each = (hidden.to(wide) - wanted).square().mean(-1)
        if settings.loss == "token":
            each = each / wanted.square().mean(-1).clamp_min(torch.finfo(wide).tiny)
        return each.sum() / scale

    tokens = [target.numel() // target.shape[-1] for target in targets]
    held_tokens = sum(target.numel() // target.shape[-1] for target in held_targets)

    def held_out() -> float:
        with torch.no_grad():
            parts = [float(error(*pair)) for pair in zip(held_calls, held_targets, strict=True)]
        return math.fsum(parts) / held_tokens

    per_call = sum(tokens) / len(tokens)
    per_step = max(1, round(settings.batch_tokens / per_call))
    epoch = settings.epoch_tokens or sum(tokens)
    steps = max(1, round(min(epoch, sum(tokens)) / (per_step * per_call)))

    def backward(index: int, total: int) -> float:
        loss = error(calls[index], targets[index]) / total
        loss.backward()
        return loss.item()

    layer.requires_grad_(False)
    found = checked_dtypes(dict(layer.named_parameters())) if everything else trainable(layer, vectors=True)
    trainer = _Trainer(list(found.values()), settings, steps * settings.epochs)
    return trainer.run(backward, tokens, per_step, steps, held_out, settings.patience, notify, started)


def refine_end_to_end(
    model: nn.Module,
    layers: Sequence[nn.Module],
    batches: Sequence[Tensor],
    teacher: Callable[[Tensor], Tensor],
    held_out: Sequence[Tensor],
    settings: EndToEndSettings,
    notify: Callable[[int, float], None] = lambda look, loss: None,
    resume: TrainingState | None = None,
    keep: Callable[[TrainingState], None] = lambda state: None,
) -> Refinement:
    """Train the forms of a whole model towards the original's next-token distribution, KL(original ‖ compressed) in nats.

    Args:
        model: a compressed causal language model of transformers in evaluation mode, with its weights.
        layers: its decoder layers; each is run anew in the backward pass instead of keeping its activations.
        batches: token ids, (samples, length) each.
        teacher: token ids -> the original's logits (samples, length, words), in any dtype and on any device; called anew each
            time, so it is the caller's choice whether they are computed or read.
        held_out: token ids of other text.
        notify: called with (number of the look, held-out loss).
        resume: where an interrupted refinement of the same model stood.
        keep: called with the state after every look.

    Raises:
        NonFiniteError: the held-out loss is no number before the first step.
        RequestError: float16.
    """
    if not batches or not held_out:
        raise ValueError("refinement needs batches to train on and batches to judge by")
    started, device = time.perf_counter(), next(model.parameters()).device

    def divergence(ids: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None, float]:
        with torch.no_grad():
            wanted = teacher(ids)
        with _multiplying_in(settings.precision, device):
            logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
        total, slope = _divergence(logits.detach(), wanted, gradient)
        return logits, slope, total

    def judge() -> float:
        with torch.no_grad():
            return math.fsum(divergence(ids, False)[2] for ids in held_out) / sum(ids.numel() for ids in held_out)

    def backward(index: int, total: int) -> float:
        logits, slope, loss = divergence(batches[index], True)
        assert slope is not None
        logits.backward(slope.div_(total))
        return loss / total

    tokens = [ids.numel() for ids in batches]
    per_step = max(1, round(settings.batch_tokens * len(tokens) / sum(tokens)))
    model.requires_grad_(False)
    trainer = _Trainer(list(trainable(model, settings.vectors).values()), settings, settings.steps, resume)
    with _checkpointed(layers if settings.gradient_checkpointing else []):
        return trainer.run(backward, tokens, per_step, settings.every, judge, settings.patience, notify, started, keep)


class _Trainer:
    """AdamW with a warm, cosine learning rate on float32 masters, and the best state so far."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        settings: BlockSettings | EndToEndSettings,
        steps: int,
        resume: TrainingState | None = None,
    ) -> None:
        self._parameters, self._settings, self._steps, self._resume = parameters, settings, steps, resume
        # a float32 parameter is its own master
        self._masters = [p if p.dtype != torch.bfloat16 else nn.Parameter(p.detach().float()) for p in parameters]
        self._done = 0
        if not parameters:
            return
        self._optimizer = torch.optim.AdamW(self._masters, settings.lr, weight_decay=settings.weight_decay, fused=True)
        if resume is not None:
            self._take_up(resume)

    def _take_up(self, state: TrainingState) -> None:
        self._done = state.steps
        with torch.no_grad():
            for number, (parameter, master) in enumerate(zip(self._parameters, self._masters, strict=True)):
                master.copy_(state.tensors[f"master.{number}"])
                parameter.copy_(master)
                if state.steps:
                    self._optimizer.state[master] = {
                        "step": torch.tensor(float(state.steps)),
                        "exp_avg": state.tensors[f"mean.{number}"].to(master),
                        "exp_avg_sq": state.tensors[f"square.{number}"].to(master),
                    }

    def _rate(self) -> float:
        """The learning rate of the next step, relative to its peak."""
        warm = self._settings.warmup * self._steps
        if self._done + 1 <= warm:
            return (self._done + 1) / (warm + 1)
        part = (self._done - warm) / max(1, self._steps - warm)
        return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * part))

    def run(
        self,
        backward: Callable[[int, int], float],
        tokens: Sequence[int],
        per_step: int,
        between: int,
        judge: Callable[[], float],
        patience: int,
        notify: Callable[[int, float], None],
        started: float,
        keep: Callable[[TrainingState], None] = lambda state: None,
    ) -> Refinement:
        """Step until the steps or the patience are used up, and leave the best state.

        Args:
            backward: (number of a batch, tokens of the step) -> its share of the step's loss, gradients added up.
            tokens: of each batch.
            per_step: batches per step.
            between: steps between two looks at the held-out loss.
            judge: the held-out loss.
            keep: called with the state after every look.
        """
        resume = self._resume
        start = judge() if resume is None else resume.start
        if not math.isfinite(start):
            raise NonFiniteError(
                "The held-out loss is not a number before refinement starts.", "Try --dtype bfloat16 or --dtype float32."
            )
        best, looks, since, stopped = start, 0, 0, "done"
        kept = [parameter.detach().clone() for parameter in self._parameters]
        if not self._parameters:
            return Refinement(start, start, 0, time.perf_counter() - started, 0, "nothing to train")
        if resume is not None:
            best, looks, since = resume.best, resume.looks, resume.since
            kept = [resume.tensors[f"best.{number}"].to(p) for number, p in enumerate(self._parameters)]
        per_step = min(per_step, len(tokens))
        order = itertools.islice(_order(len(tokens), self._settings.seed), self._done * per_step, None)
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            while self._done < self._steps:
                if since >= patience:
                    stopped = "early"
                    break
                for _ in range(min(between, self._steps - self._done)):
                    batch = [next(order) for _ in range(per_step)]
                    total = sum(tokens[index] for index in batch)
                    with torch.enable_grad():
                        loss = math.fsum(self._added(backward, index, total) for index in batch)
                    if not math.isfinite(loss):
                        break
                    self._step()
                if not math.isfinite(loss):
                    stopped = "diverged"
                    break
                now = judge()
                looks += 1
                notify(looks, now)
                since += 1
                if now < best:
                    best, since = now, 0
                    kept = [parameter.detach().clone() for parameter in self._parameters]
                keep(TrainingState(start, best, self._done, looks, since, self._tensors(kept)))
        finally:  # an interrupted refinement leaves a good layer too
            for parameter, value in zip(self._parameters, kept, strict=True):
                parameter.requires_grad_(False).copy_(value)
                parameter.grad = None
        count = sum(parameter.numel() for parameter in self._parameters)
        return Refinement(start, best, self._done, time.perf_counter() - started, count, stopped)

    def _tensors(self, kept: Sequence[Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, (best, master) in enumerate(zip(kept, self._masters, strict=True)):
            moments = self._optimizer.state[master]
            found |= {f"best.{number}": best, f"master.{number}": master.detach()}
            found |= {f"mean.{number}": moments["exp_avg"], f"square.{number}": moments["exp_avg_sq"]}
        return found

    def _added(self, backward: Callable[[int, int], float], index: int, total: int) -> float:
        """One batch's loss; its gradients are added to the masters', so that sums over a step are in float32."""
        loss = backward(index, total)
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                wide = parameter.grad.float()
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                parameter.grad = None
        return loss

    @torch.no_grad()
    def _step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr * self._rate()
        torch.nn.utils.clip_grad_norm_(self._masters, self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
        self._done += 1


def _multiplying_in(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products in bfloat16 where the settings ask for it; else a context that changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def _order(count: int, seed: int) -> Iterator[int]:
    """Numbers below `count`, one shuffled round after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


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


def _divergence(logits: Tensor, wanted: Tensor, gradient: bool) -> tuple[float, Tensor | None]:
    """Sum over tokens of KL(softmax(wanted) ‖ softmax(logits)) and its slope in the logits; widened a few tokens at a time."""
    slope = torch.empty_like(logits) if gradient else None
    rows, theirs = logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    flat = None if slope is None else slope.view(rows.shape)
    total, step = 0.0, max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    for start in range(0, len(rows), step):
        mine = rows[start : start + step].float().log_softmax(-1)
        true = theirs[start : start + step].to(mine).log_softmax(-1)
        p = true.exp()
        total += float((p * (true - mine)).sum(dtype=torch.float64))
        if flat is not None:
            flat[start : start + step] = mine.exp_().sub_(p)
    return total, slope


@contextlib.contextmanager
def _checkpointed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While the context is open, the layers keep no activations for a backward pass: they run again in it.

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
