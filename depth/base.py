"""Dropping layers or sub-layers, and repairing the rest of the model: contracts and registry of scores and repairs.

A score is one pure function that chooses which candidates are removed. A candidate is a layer, or one residual sub-layer of a
layer (attention or feed-forward); the score knows candidates by their numbers only, in the order of a forward. Each score
declares its input:

* `states`: the hidden states of a few calibration tokens before and after every layer;
* `loss`: a function that measures the model's loss (mean negative log likelihood in nats per token) without some candidates;
* `divergence`: the same for the divergence of its predictions from those of the whole model;
* nothing.

A repair compensates for a run of dropped layers, without training (a linear map, fitted to hidden states) or with it.

Scores and repairs need no mask: no state and no loss here belongs to a padded token, because calibration packs text into full
windows (calibrate/data.py).

Scores that compare hidden states by cosine alone are cheap and can be badly wrong: dropping a run of seven layers chosen by
cosine takes Llama-3-8B from a perplexity of 6.1 to 2288 (LinearPatch, NeurIPS 2025), because a few dimensions with very large
values make any two states look alike. Evaluate the result before you use it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..compress.registry import first_line, import_all
from ..errors import BudgetError, RequestError, did_you_mean

Looks = Literal["states", "loss", "divergence", ""]
# layers -> whether they can leave the model, alone or with others (depth/candidates.py)
MayGo = Callable[[Collection[int]], bool]
# boundaries (layers + 1 tensors of (samples, length, hidden)), candidates, how many to drop -> the dropped layers, ascending
ByStates = Callable[[Sequence[Tensor], Sequence[int], int, MayGo], list[int]]
# sets of removed candidates -> loss or divergence of each such model, nats per token
Trial = Callable[[Sequence[frozenset[int]]], list[float]]
# removed candidates -> whether these are enough
Enough = Callable[[Collection[int]], bool]
# trial, candidates, enough -> the removed candidates, ascending
ByTrial = Callable[[Trial, Sequence[int], Enough], list[int]]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Score:
    """A registered score.

    Args:
        name: as recipes write it.
        choose: `ByStates` where its input is states or nothing, else `ByTrial`; candidates are not protected.
        source: the paper it comes from.
        by_cosine: whether it compares directions of hidden states only.
        looks: its input; empty for nothing.
        one_run: whether it always chooses neighbouring layers.
        tokens_per_channel: how many tokens of hidden states it needs for each channel of the model's width.
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
        """Whether it measures the model without some candidates."""
        return self.looks in ("loss", "divergence")

    @property
    def summary(self) -> str:
        """The first line of the score's file."""
        return first_line(self.choose, self.name)


class Fit(Protocol):
    """A linear map that is fitted to pairs of states, batch by batch."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add states (tokens, width) and the states that the map should make of them."""

    def change(self) -> tuple[Tensor, Tensor | None]:
        """(D, b), float64: the map is x + D x + b; D is (width, width), b is (width,) or None."""


@dataclass(frozen=True)
class Repair:
    """A registered repair.

    Args:
        name: as recipes write it.
        make: (width, damping) -> `Fit` where it is fitted; `Training` -> `Training` with its own defaults where it is trained.
        source: the paper it comes from.
        on: what it changes: `stream`: the hidden state where the run was; `sub-layer`: the output of the last sub-layer before
            the run; `layer`: the first layer of the run, which is kept in place of the run; `end`: norm, head and last layers.
        damped: whether it is fitted by least squares; damping then pulls the map towards the identity.
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
    """How a trained repair is trained; for a key that is left out, the repair's file gives its own default and the reason.

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
        """The same with these defaults for keys that were left out."""
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


def anything(layers: Collection[int]) -> bool:
    """Any layers may go."""
    return True


def cheapest(values: Mapping[int, float], count: int, may_go: MayGo) -> list[int]:
    """The `count` layers of the smallest values that can go together; ascending.

    Of equally cheap layers the one with the smallest number comes first.
    """
    chosen: list[int] = []
    for layer in sorted(values, key=lambda layer: (values[layer], layer)):
        if len(chosen) < count and may_go([*chosen, layer]):
            chosen.append(layer)
    return sorted(chosen)


def runs(candidates: Sequence[int], count: int, may_go: MayGo) -> list[int]:
    """The first layers of all runs of `count` neighbouring candidates that can go; ascending.

    Raises:
        BudgetError: there is none.
    """
    known = set(candidates)
    starts = [first for first in sorted(known) if known.issuperset(range(first, first + count))]
    found = [first for first in starts if may_go(range(first, first + count))]
    if not found:
        raise BudgetError(f"No run of {count} neighbouring layers is left to drop.", "Protect fewer layers, or drop fewer.")
    return found


def greedily(trial: Trial, candidates: Sequence[int], enough: Enough) -> list[int]:
    """In each round remove the candidate without which the model is best, until enough are removed; ascending.

    Of equally good candidates the one with the smallest number is removed, so that their order does not change the result.
    """
    removed: set[int] = set()
    while not enough(removed):
        left = [candidate for candidate in sorted(candidates) if candidate not in removed]
        found = trial([frozenset(removed | {candidate}) for candidate in left])
        removed.add(min(zip(found, left, strict=True))[1])
    return sorted(removed)
