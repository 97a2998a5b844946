"""Dropping layers or sub-layers, and repairing what is left: contracts and registry of scores and repairs.

A score is one pure function that says which parts go. A part is a layer, or one residual sub-layer of a layer (attention, or
feed-forward); the score knows parts by their numbers only, in the order of a forward. What it is shown is its own choice:

* `states`: the hidden states that a few calibration tokens have before and after every layer;
* `loss`: a function that says what the model loses (mean negative log likelihood in nats per token) without some parts;
* `divergence`: the same for the divergence of its predictions from those of the whole model;
* nothing.

A repair says how to make up for a run of dropped layers, without training (a linear map, fitted to hidden states) or with it.

No state or loss here ever belongs to a padded token, so that scores and repairs need no mask: calibration packs text into full
windows (calibrate/data.py), and every token of a window is real.

Scores that compare hidden states by cosine alone are cheap and can be badly wrong: on Llama-3-8B a contiguous run of seven
layers chosen so takes the perplexity from 6.1 to 2288 (LinearPatch, NeurIPS 2025), because few dimensions of very large value
make any two states look alike. Look at the result before you use it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..compress.registry import first_line, import_all
from ..errors import RequestError, did_you_mean

Looks = Literal["states", "loss", "divergence", ""]
# boundaries (layers + 1 tensors of (samples, length, hidden)), candidates, how many go -> the layers that go, ascending
ByStates = Callable[[Sequence[Tensor], Sequence[int], int], list[int]]
# sets of parts that are taken out -> nats per token of each such model
Trial = Callable[[Sequence[frozenset[int]]], list[float]]
# parts -> whether enough is gone when these are
Enough = Callable[[Collection[int]], bool]
# trial, candidates, enough -> the parts that go, ascending
ByTrial = Callable[[Trial, Sequence[int], Enough], list[int]]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Score:
    """A registered score.

    Args:
        name: as recipes write it.
        choose: `ByStates` where it looks at states or at nothing, else `ByTrial`; candidates are the parts that are not
            protected.
        source: the paper it comes from.
        by_cosine: whether it compares directions of hidden states only.
        looks: what it is shown; empty for nothing.
        one_run: whether what it chooses are always neighbours.
        tokens_per_channel: of the hidden states; fewer than so many times the model's width tell it nothing.
    """

    name: str
    choose: Callable[..., list[int]]
    source: str
    by_cosine: bool = False
    looks: Looks = "states"
    one_run: bool = False
    tokens_per_channel: int = 0

    @property
    def tries(self) -> bool:
        """Whether it asks what the model loses without some parts."""
        return self.looks in ("loss", "divergence")

    @property
    def summary(self) -> str:
        """The first line of the score's file."""
        return first_line(self.choose, self.name)


class Fit(Protocol):
    """A linear map that is fitted to pairs of states, batch by batch."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in states (tokens, width) and what they should become."""

    def change(self) -> tuple[Tensor, Tensor | None]:
        """(D, b), float64: the map is x + D x + b; D is (width, width), b is (width,) or None."""


@dataclass(frozen=True)
class Repair:
    """A registered repair.

    Args:
        name: as recipes write it.
        make: (width, damping) -> `Fit` where it is fitted; `Training` -> `Training` with its own defaults where it is trained.
        source: the paper it comes from.
        on: what it changes: `stream`: the hidden state where the run was; `sub-layer`: what the last sub-layer before the run
            adds to it; `layer`: one layer of the run stays and stands in for it; `end`: norm, head and the last layers.
        damped: whether it is fitted by least squares, which damping pulls towards leaving the state as it is.
    """

    name: str
    make: Callable[..., Any]
    source: str
    on: Literal["stream", "sub-layer", "layer", "end"]
    damped: bool = False

    @property
    def trained(self) -> bool:
        return self.on in ("layer", "end")

    @property
    def summary(self) -> str:
        """The first line of the repair's file."""
        return first_line(self.make, self.name)


class Training(BaseModel):
    """How a trained repair is trained; what is left out is the repair's own default (its file says which and why).

    Args:
        lr: peak of AdamW's learning rate.
        epochs: over the calibration tokens, at most.
        batch_tokens: tokens per step.
        patience: epochs without a better held-out loss before stopping.
        weight_decay: of AdamW.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    epochs: int | None = Field(default=None, ge=1)
    batch_tokens: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=1)
    weight_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    def filled(self, **defaults: float) -> Training:
        """The same with defaults where nothing was given."""
        return Training(**(defaults | self.model_dump(exclude_none=True)))


_SCORES: dict[str, Score] = {}
_REPAIRS: dict[str, Repair] = {}


def score(
    name: str,
    *,
    source: str,
    by_cosine: bool = False,
    looks: Looks = "states",
    one_run: bool = False,
    tokens_per_channel: int = 0,
) -> Callable[[F], F]:
    """Register a function as the score `name`."""

    def register(choose: F) -> F:
        _SCORES[name] = Score(name, choose, source, by_cosine, looks, one_run, tokens_per_channel)
        return choose

    return register


def repair(
    name: str, *, source: str, on: Literal["stream", "sub-layer", "layer", "end"], damped: bool = False
) -> Callable[[F], F]:
    """Register a function as the repair `name`."""

    def register(make: F) -> F:
        _REPAIRS[name] = Repair(name, make, source, on, damped)
        return make

    return register


def scores() -> dict[str, Score]:
    """All scores by name: every module of this package registers its own on import."""
    import_all(__package__ or "lrc.depth")
    return dict(sorted(_SCORES.items()))


def repairs() -> dict[str, Repair]:
    """All repairs by name."""
    import_all(__package__ or "lrc.depth")
    return dict(sorted(_REPAIRS.items()))


def get_score(name: str) -> Score:
    """The score of that name.

    Raises:
        RequestError: there is none; says which one was probably meant.
    """
    known = scores()
    if name not in known:
        raise RequestError(f"There is no layer score '{name}'.", did_you_mean(name, known))
    return known[name]


def get_repair(name: str) -> Repair:
    """The repair of that name; as for `get_score`."""
    known = repairs()
    if name not in known:
        raise RequestError(f"There is no repair '{name}'.", did_you_mean(name, known))
    return known[name]


def greedily(trial: Trial, candidates: Sequence[int], enough: Enough) -> list[int]:
    """Take out, again and again, the part without which the model is best, until enough is gone; ascending.

    Of equal candidates the earlier one goes, so that the result does not depend on their order.
    """
    gone: set[int] = set()
    while not enough(gone):
        left = [part for part in sorted(candidates) if part not in gone]
        found = trial([frozenset(gone | {part}) for part in left])
        gone.add(min(zip(found, left, strict=True))[1])
    return sorted(gone)
