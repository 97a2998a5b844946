"""Limits: bounds that a recipe sets on the bytes or the rank of some targets.

A recipe's `limits` map patterns to floors, caps or fixed ranks:

    limits:
      "*.down_proj": {min: 0.5}            # the target keeps at least half of its bytes
      "*.q_proj": {max: 0.4}               # the target keeps at most 0.4 of its bytes
      "*.layers.-1.mlp.up_proj": {rank: 0.01}   # the budget cannot change this rank, here a fraction of the full rank

Patterns match full names and roles, like the patterns of `keep`. A pattern may count layers from the end (-1 is the last
layer). If several patterns match a target, all of their limits apply.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..compress.options import JointOption, Option, Shape
from ..errors import BudgetError, RecipeError, did_you_mean
from ..model.targets import Target
from .units import Unit


class Limit(BaseModel):
    """The limit that one pattern sets on each target it matches.

    Args:
        min: smallest fraction of its dense bytes that a target may keep; 1 makes the target stay dense.
        max: largest fraction of its dense bytes that a target may keep; with less than 1 the target cannot stay dense.
        rank: rank of the target: a whole number, or a fraction of the full rank (rounded, at least 1).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: float | None = Field(None, gt=0, le=1)
    max: float | None = Field(None, gt=0, le=1)
    rank: int | float | None = Field(None, allow_inf_nan=False)

    @field_validator("rank", mode="before")
    @classmethod
    def _a_rank(cls, rank: Any) -> Any:
        if isinstance(rank, bool) or (isinstance(rank, int | float) and (rank <= 0 or (isinstance(rank, float) and rank >= 1))):
            raise ValueError("must be a whole number from 1 on, or a fraction of the full rank between 0 and 1")
        return rank

    @model_validator(mode="after")
    def _one_thing(self) -> Limit:
        if self.min is None and self.max is None and self.rank is None:
            raise ValueError("give min, max or rank")
        if self.rank is not None and (self.min is not None or self.max is not None):
            raise ValueError("a rank fixes the size; leave out min and max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


@dataclass(frozen=True)
class Bounds:
    """The limits of one target, each with the pattern that sets it (`why_…`)."""

    min: float = 0.0
    max: float = 1.0
    rank: int | None = None
    why_min: str = ""
    why_max: str = ""
    why_rank: str = ""

    @property
    def dense(self) -> bool:
        """Whether the limits allow only the dense form."""
        return self.min >= 1

    @property
    def may_be_dense(self) -> bool:
        return self.max >= 1 and self.rank is None


def matches(target: Target, pattern: str, layers: int) -> bool:
    """Whether a pattern matches the target's name or role; the pattern may count layers from the end.

    Args:
        layers: number of layers of the model.
    """
    from_end = target.name.replace(f".{target.layer}.", f".{target.layer - layers}.", 1)
    return any(fnmatch.fnmatchcase(name, pattern) for name in (target.name, target.role, from_end))


def unmatched(key: str, pattern: str, targets: Iterable[Target]) -> str:
    """The error line for a pattern that matches no target."""
    roles = {target.role for target in targets}
    known = roles | {f"*.{role.rpartition('.')[2]}" for role in roles}
    return f"{key}: '{pattern}' matches no target. {did_you_mean(pattern, known)}"


def bounds_of(targets: Sequence[Target], limits: Mapping[str, Limit], layers: int) -> dict[str, Bounds]:
    """The bounds of every target that at least one pattern matches, by target name.

    Args:
        layers: number of layers of the model.

    Raises:
        RecipeError: a pattern matches no target, or two patterns contradict each other.
    """
    found: dict[str, Bounds] = {}
    problems: list[str] = []
    for pattern, limit in limits.items():
        hits = [target for target in targets if matches(target, pattern, layers)]
        if not hits:
            problems.append(unmatched("limits", pattern, targets))
        for target in hits:
            before = found.get(target.name, Bounds())
            found[target.name] = now = _both(before, limit, pattern, target)
            if (problem := _contradiction(target.name, before, now, limit, pattern)) and len(problems) < _SHOWN:
                problems.append(problem)
    if problems:
        raise RecipeError("recipe", problems)
    return found


_SHOWN = 8  # contradictions that an error shows; the same one often occurs in every layer


def _both(bounds: Bounds, limit: Limit, pattern: str, target: Target) -> Bounds:
    if limit.min is not None and limit.min > bounds.min:
        bounds = replace(bounds, min=limit.min, why_min=pattern)
    if limit.max is not None and limit.max < bounds.max:
        bounds = replace(bounds, max=limit.max, why_max=pattern)
    if limit.rank is not None:
        bounds = replace(bounds, rank=_rank(limit.rank, target), why_rank=pattern)
    return bounds


def _rank(rank: int | float, target: Target) -> int:
    return rank if isinstance(rank, int) else max(1, round(rank * min(target.out_features, target.in_features)))


def _contradiction(name: str, before: Bounds, now: Bounds, limit: Limit, pattern: str) -> str:
    if limit.rank is not None and before.rank is not None and before.rank != now.rank:
        return f"limits: '{before.why_rank}' gives {name} rank {before.rank}, '{pattern}' rank {now.rank}"
    if now.rank is not None and (now.min > 0 or now.max < 1):
        other = now.why_min or now.why_max
        return f"limits: '{now.why_rank}' fixes the rank of {name} at {now.rank}, and '{other}' bounds its bytes"
    if now.min > now.max:
        return f"limits: {name} keeps at least {now.min:g} by '{now.why_min}' and at most {now.max:g} by '{now.why_max}'"
    return ""


def may_be_dense(unit: Unit, bounds: Mapping[str, Bounds]) -> bool:
    """Whether the limits allow all targets of a unit to stay dense."""
    return all(bounds[target.name].may_be_dense for target in unit.targets if target.name in bounds)


def within(unit: Unit, bounds: Mapping[str, Bounds], shapes: Mapping[str, Shape], options: Sequence[Option]) -> list[Option]:
    """The options of a unit that the bounds of all its targets allow, without the dense form (see `may_be_dense`).

    Args:
        bounds: bounds of each target that has limits, by target name.
        shapes: shapes of at least those targets, by target name.
        options: all options of the unit.

    Raises:
        BudgetError: no option satisfies the bounds, and the targets may not stay dense either; the message states the
            ranks or sizes that the method offers.
    """
    left, hold = list(options), [number for number, target in enumerate(unit.targets) if target.name in bounds]
    for number in hold:
        name = unit.targets[number].name
        left = _within(name, bounds[name], shapes[name], left, number)
    if hold and not left and not may_be_dense(unit, bounds):
        names = [unit.targets[number].name for number in hold]
        raise BudgetError(
            f"limits: {' and '.join(names)} are solved together, and no option satisfies the limits of all of them.",
            "Widen the limits of one of them, or use a method that solves every target alone.",
        )
    return left


def _within(name: str, bounds: Bounds, shape: Shape, options: Sequence[Option], number: int) -> list[Option]:
    """The options of a unit in which its target with index `number` satisfies the bounds."""
    own = [option.members[number] if isinstance(option, JointOption) else option for option in options]
    if bounds.rank is not None:
        left = [option for option, mine in zip(options, own, strict=True) if mine.choice.rank == bounds.rank]
        if not left:
            ranks = [mine.choice.rank for mine in own if mine.choice.rank is not None]
            has = f"its ranks go from {min(ranks)} to {max(ranks)}" if ranks else "the method has no low-rank option for it"
            raise BudgetError(
                f"limits: '{bounds.why_rank}' gives {name} ({shape.out_features} × {shape.in_features}) rank {bounds.rank}; "
                f"{has} (factors of a larger rank save no bytes).",
                "Change that rank, or change rank_multiple: all ranks are multiples of it.",
            )
        return left
    low, high = bounds.min * shape.nbytes, bounds.max * shape.nbytes * (1 + 1e-12)
    left = [option for option, mine in zip(options, own, strict=True) if low <= mine.nbytes <= high]
    if not left and not bounds.may_be_dense:
        sizes = [mine.nbytes / shape.nbytes for mine in own]
        has = f"the method's options keep {min(sizes):.3f} to {max(sizes):.3f}" if sizes else "the method has no option for it"
        raise BudgetError(
            f"limits: {name} may keep {bounds.min:g} to {bounds.max:g} of its bytes ('{bounds.why_max}'); {has}.",
            "Widen the limits, or lower rank_multiple.",
        )
    return left


def even(
    options: Mapping[str, tuple[int, Sequence[Option]]], whole: Collection[str], budget: int | None
) -> dict[str, Option | None]:
    """Give every unit the same fraction of its dense bytes, as far as its limits allow: the largest that fits the budget.

    Args:
        options: unit -> (its dense bytes, the options that its limits allow, ascending in bytes).
        whole: units that may stay dense.
        budget: bytes for all units together; None gives each unit the largest size that its limits allow.

    Returns:
        unit -> its option, None for dense.

    Raises:
        BudgetError: the smallest sizes that the limits allow exceed the budget.
    """

    def at(share: float) -> dict[str, Option | None]:
        found: dict[str, Option | None] = {}
        for name, (dense, own) in options.items():
            allowed = int(share * dense + 1e-6)
            if name in whole and (allowed >= dense or not own):
                found[name] = None
            else:
                found[name] = max(
                    (option for option in own if option.nbytes <= allowed), key=lambda option: option.nbytes, default=own[0]
                )
        return found

    def nbytes(chosen: Mapping[str, Option | None]) -> int:
        return sum(options[name][0] if option is None else option.nbytes for name, option in chosen.items())

    if budget is None or nbytes(at(1.0)) <= budget:
        return at(1.0)
    if (least := nbytes(at(0.0))) > budget:
        raise BudgetError(
            f"The budget allows {budget:,} bytes for the targets that are not kept; with these limits they take at least "
            f"{least:,}.",
            "Raise the budget, or lower the limits (min, rank).",
        )
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection to a precision of 2^-60
        middle = (low + high) / 2
        low, high = (middle, high) if nbytes(at(middle)) <= budget else (low, middle)
    return at(low)
