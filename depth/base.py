"""Dropping whole layers: the contract of a score, and its registry.

A score is one pure function: from the hidden states that a few calibration tokens have before and after every layer, and the
number of layers that shall go, to the layers that go. The rest of the way (plan, artifact, checks) is that of every recipe, and
the result is a plain checkpoint of the original architecture with its layers renumbered.

Scores that compare hidden states by cosine alone are cheap and can be badly wrong: on Llama-3-8B a contiguous run of seven
layers chosen so takes the perplexity from 6.1 to 2288 (LinearPatch, NeurIPS 2025), because few dimensions of very large value
make any two states look alike. Look at the result before you use it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import RequestError, did_you_mean

# boundaries (layers + 1 tensors of (samples, length, hidden)), candidates, how many go -> the layers that go, ascending
Choose = Callable[[Sequence[Tensor], Sequence[int], int], list[int]]


@dataclass(frozen=True)
class Score:
    """A registered score.

    Args:
        name: as recipes write it.
        choose: see `Choose`; candidates are the layers that are not protected.
        source: the paper it comes from.
        by_cosine: whether it compares directions of hidden states only.
        looks: whether it looks at hidden states at all.
    """

    name: str
    choose: Choose
    source: str
    by_cosine: bool = False
    looks: bool = True

    @property
    def summary(self) -> str:
        """The first line of the score's file."""
        return (importlib.import_module(self.choose.__module__).__doc__ or self.name).strip().splitlines()[0]


_SCORES: dict[str, Score] = {}


def score(name: str, *, source: str, by_cosine: bool = False, looks: bool = True) -> Callable[[Choose], Choose]:
    """Register a function as the score `name`."""

    def register(choose: Choose) -> Choose:
        _SCORES[name] = Score(name, choose, source, by_cosine, looks)
        return choose

    return register


def scores() -> dict[str, Score]:
    """All scores by name: every module of this package registers its own on import."""
    package = importlib.import_module(__package__ or "lrc.depth")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    return dict(sorted(_SCORES.items()))


def get_score(name: str) -> Score:
    """The score of that name.

    Raises:
        RequestError: there is none; says which one was probably meant.
    """
    known = scores()
    if name not in known:
        raise RequestError(f"There is no layer score '{name}'.", did_you_mean(name, known))
    return known[name]
