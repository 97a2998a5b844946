"""Training for all refinements: AdamW on float32 masters, early stopping on a held-out loss, and the best state kept.

A training stops early on data that it does not train on, and leaves the parameters in the state that was best there: never
worse than at the start. Nothing here reads or writes files.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..compress.base import Settings
from ..compress.forms.base import is_form_module
from ..errors import NonFiniteError, RequestError
from ..model.events import Event, Notify, silent

FINAL_LR = 0.1  # of the peak, at the end of the cosine
_TRAINED = (torch.bfloat16, torch.float32, torch.float64)


class TrainingSettings(Settings):
    """Settings of every training.

    Attributes:
        lr: peak of AdamW's learning rate.
        batch_tokens: tokens per step.
        patience: how many evaluations of the held-out loss without a better one before stopping.
        weight_decay: of AdamW.
        warmup: fraction of all steps in which the learning rate rises; then it falls in a cosine to a tenth.
        clip: largest norm of a step's gradient.
        precision: `bfloat16` multiplies in bfloat16 whatever the model's dtype is (weights and sums keep theirs), which is
            several times as fast where the processor has the instructions; `model`: in the model's own dtype.
        seed: of the order of the batches.
    """

    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    batch_tokens: int = Field(default=8192, ge=1)
    patience: int = Field(default=2, ge=1)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    precision: Literal["model", "bfloat16"] = "model"
    seed: int = 0


@dataclass(frozen=True)
class TrainingState:
    """The state of a training after an evaluation of the held-out loss, from which a killed training continues.

    Args:
        start, best: held-out losses.
        steps: optimizer steps so far.
        looks: evaluations of the held-out loss so far.
        since: evaluations since the best one.
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
    """What a training did.

    Args:
        start, best: held-out loss before and after; equal if no step lowered it, and then no parameter has changed.
        steps: optimizer steps taken.
        seconds: of wall time.
        parameters: how many were trained.
        stopped: why it ended: 'done', 'early' (patience), 'diverged' (the training loss was not finite), 'nothing to train'.
    """

    start: float
    best: float
    steps: int
    seconds: float
    parameters: int
    stopped: str


@dataclass(frozen=True)
class Windows:
    """The text of a training.

    Args:
        train: (windows, length) int64 token ids to train on.
        held_out: (windows, length) int64 token ids that decide when to stop and what to keep; lengths may differ.
    """

    train: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class Course:
    """The losses of a training, and how often each is computed.

    Args:
        backward: (number of a batch, tokens of the step) -> its share of the step's loss; adds to the gradients.
        tokens: how many each batch has.
        per_step: batches per step.
        between: steps between two evaluations of the held-out loss.
        judge: computes the held-out loss.
        started: `time.perf_counter()` when the work began, for the report.
    """

    backward: Callable[[int, int], float]
    tokens: Sequence[int]
    per_step: int
    between: int
    judge: Callable[[], float]
    started: float = field(default_factory=time.perf_counter)


def trainable(module: nn.Module, vectors: bool) -> dict[str, nn.Parameter]:
    """The parameters that refinement trains, by name: those of forms, and with `vectors` all norms and biases.

    Raises:
        RequestError: some are in float16, in which gradients underflow.
    """
    found = {}
    for path, child in module.named_modules():
        if is_form_module(child):
            found.update({f"{path}.{name}" if path else name: p for name, p in child.named_parameters()})
    if vectors:
        found.update({name: p for name, p in module.named_parameters() if p.ndim == 1})
    return checked_dtypes(found)


def checked_dtypes(found: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of the parameters that can be trained.

    Raises:
        RequestError: some are in float16, in which gradients underflow.
    """
    for name, parameter in found.items():
        if parameter.dtype == torch.float16:
            raise RequestError(f"{name} is in float16, in which gradients underflow.", "Add --dtype bfloat16 or float32.")
    return {name: p for name, p in found.items() if p.dtype in _TRAINED and p.numel()}


class Trainer:
    """AdamW with a warm, cosine learning rate on float32 masters, and the best state so far.

    Args:
        parameters: as `checked_dtypes` gives them.
        settings: of the training.
        steps: at most.
        resume: the last state of an interrupted training of the same parameters.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], settings: TrainingSettings, steps: int, resume: TrainingState | None = None
    ) -> None:
        self._parameters, self._settings, self._steps, self._resume = list(parameters), settings, steps, resume
        # a float32 parameter is its own master
        self._masters = [p if p.dtype != torch.bfloat16 else nn.Parameter(p.detach().float()) for p in self._parameters]
        self._done = 0
        if not self._parameters:
            return
        self._optimizer = torch.optim.AdamW(self._masters, settings.lr, weight_decay=settings.weight_decay, fused=True)
        if resume is not None:
            self._take_up(resume)

    def run(
        self,
        course: Course,
        notify: Notify = silent,
        keep: Callable[[TrainingState], None] = lambda state: None,
    ) -> Refinement:
        """Train until the steps or the patience are used up; the parameters end in their best state, without gradients.

        Args:
            course: the losses.
            notify: is told of each evaluation and its held-out loss.
            keep: called with the state after every evaluation of the held-out loss.

        Raises:
            NonFiniteError: the held-out loss is not finite before the first step.
        """
        resume = self._resume
        start = course.judge() if resume is None else resume.start
        if not math.isfinite(start):
            raise NonFiniteError(
                "The held-out loss is not a number before refinement starts.", "Try --dtype bfloat16 or --dtype float32."
            )
        if not self._parameters:
            return Refinement(start, start, 0, time.perf_counter() - course.started, 0, "nothing to train")
        best, looks, since = (start, 0, 0) if resume is None else (resume.best, resume.looks, resume.since)
        kept = self._values() if resume is None else [resume.tensors[f"best.{i}"] for i in range(len(self._parameters))]
        per_step = min(course.per_step, len(course.tokens))
        order = itertools.islice(_order(len(course.tokens), self._settings.seed), self._done * per_step, None)
        stopped = "done"
        try:
            for parameter in self._parameters:
                parameter.requires_grad_(True)
            while self._done < self._steps:
                if since >= self._settings.patience:
                    stopped = "early"
                    break
                if not self._advance(course, order, per_step):
                    stopped = "diverged"
                    break
                now = course.judge()
                looks, since = looks + 1, since + 1
                notify(Event("evaluation", looks, loss=now))
                if now < best:
                    best, since, kept = now, 0, self._values()
                keep(TrainingState(start, best, self._done, looks, since, self._tensors(kept)))
        finally:  # an interrupted training leaves a good state too
            for parameter, value in zip(self._parameters, kept, strict=True):
                parameter.requires_grad_(False).copy_(value)
                parameter.grad = None
        count = sum(parameter.numel() for parameter in self._parameters)
        return Refinement(start, best, self._done, time.perf_counter() - course.started, count, stopped)

    def _advance(self, course: Course, order: Iterator[int], per_step: int) -> bool:
        """Take the steps up to the next evaluation; False where a loss was not finite, and then that step was not taken."""
        for _ in range(min(course.between, self._steps - self._done)):
            batch = list(itertools.islice(order, per_step))
            total = sum(course.tokens[index] for index in batch)
            with torch.enable_grad():
                loss = math.fsum(self._added(course.backward, index, total) for index in batch)
            if not math.isfinite(loss):
                return False
            self._step()
        return True

    def _added(self, backward: Callable[[int, int], float], index: int, total: int) -> float:
        """A batch's share of the loss; its gradients are added to those of the masters, so that sums are in float32."""
        loss = backward(index, total)
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                wide = parameter.grad.float()
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                parameter.grad = None
        return loss

    @torch.no_grad()
    def _step(self) -> None:
        for master in self._masters:
            if master.grad is None:  # of an expert that no token reached: its moments and step count advance like all others
                master.grad = torch.zeros_like(master)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr * self._rate()
        torch.nn.utils.clip_grad_norm_(self._masters, self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
        self._done += 1

    def _rate(self) -> float:
        """The learning rate of the next step, relative to its peak."""
        warm = self._settings.warmup * self._steps
        if self._done + 1 <= warm:
            return (self._done + 1) / (warm + 1)
        progress = (self._done - warm) / max(1, self._steps - warm)
        return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))

    def _values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _tensors(self, kept: Sequence[Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, (best, master) in enumerate(zip(kept, self._masters, strict=True)):
            moments = self._optimizer.state[master]
            found |= {f"best.{number}": best, f"master.{number}": master.detach()}
            found |= {f"mean.{number}": moments["exp_avg"], f"square.{number}": moments["exp_avg_sq"]}
        return found

    def _take_up(self, state: TrainingState) -> None:
        self._done = state.steps
        with torch.no_grad():
            for number, (parameter, master) in enumerate(zip(self._parameters, self._masters, strict=True)):
                master.copy_(state.tensors[f"master.{number}"])
                parameter.copy_(master)
                if state.steps:
                    self._optimizer.state[master] = {
                        "step": torch.tensor(float(state.steps), device=master.device),
                        "exp_avg": state.tensors[f"mean.{number}"].to(master),
                        "exp_avg_sq": state.tensors[f"square.{number}"].to(master),
                    }


def multiplying_in(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which products are in bfloat16 if `precision` is 'bfloat16'; else one that changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def _order(count: int, seed: int) -> Iterator[int]:
    """Numbers below `count`, one shuffled round after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
