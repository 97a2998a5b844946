"""What a budget chooses among: the options of a method for storing a target or several targets together, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choice:
    """What the budget gives a target: the numbers that determine the size of its form. All None: the target stays dense.

    Args:
        rank: of the low-rank factors.
        bits: of the quantized weight; of the quantized base where there is a low-rank correction too.
        factor_bits: of the low-rank factors; None stores them in the checkpoint's own dtype.
        atoms: rows of the dictionary.
        nonzeros: nonzero codes per row of the weight, on average.
        alternative: number of the method, where a recipe has several.
        channels: kept inner channels of a feed-forward.
    """

    rank: int | None = None
    bits: int | None = None
    factor_bits: int | None = None
    atoms: int | None = None
    nonzeros: int | None = None
    alternative: int | None = None
    channels: int | None = None

    @property
    def dense(self) -> bool:
        return self == Choice()


@dataclass(frozen=True)
class Shape:
    """What the size of a form depends on; known from the checkpoint's headers.

    Args:
        out_features, in_features: of the weight.
        element: bytes of one number in the checkpoint's own dtype.
        bias: whether the target has a bias already; if not, an option that adds one counts its bytes.
    """

    out_features: int
    in_features: int
    element: int
    bias: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the dense weight."""
        return self.out_features * self.in_features * self.element


@dataclass(frozen=True)
class Option:
    """One way to store a target.

    Args:
        choice: the numbers that determine the size.
        nbytes: exact bytes on disk, without the target's own bias.
        halfway: for a method of two steps, the bytes after the first step.
    """

    choice: Choice
    nbytes: int
    halfway: int | None = field(default=None, kw_only=True)


def break_even(out_features: int, in_features: int) -> int:
    """The largest rank at which two factors have fewer numbers than the matrix."""
    return (out_features * in_features - 1) // (out_features + in_features)


def low_rank_options(shape: Shape, settings: Any, multiple: int = 1) -> list[Option]:
    """Every rank (in steps of `multiple`) at which two factors in the checkpoint's dtype are smaller than the matrix."""
    each = (shape.out_features + shape.in_features) * shape.element
    ranks = range(multiple, break_even(shape.out_features, shape.in_features) + 1, multiple)
    return [Option(Choice(rank=rank), rank * each) for rank in ranks]


def at_sizes(*sizes: float) -> Callable[[Sequence[Option], int], list[int]]:
    """(options, dense bytes) -> indices, ascending, of the options nearest to these fractions of the dense bytes."""

    def nearest(options: Sequence[Option], dense: int) -> list[int]:
        found = {min(range(len(options)), key=lambda i: abs(options[i].nbytes - size * dense)) for size in sizes if options}
        return sorted(found)

    return nearest


def at_shares(*shares: float) -> Callable[[Sequence[Option], int], list[int]]:
    """(options, dense bytes) -> indices, ascending, of the options nearest to these fractions of the largest option's bytes."""

    def nearest(options: Sequence[Option], dense: int) -> list[int]:
        return at_sizes(*shares)(options, max((option.nbytes for option in options), default=0))

    return nearest


def coarsest(count: int) -> Callable[[Sequence[Option], int], list[int]]:
    """(options, dense bytes) -> indices of the `count` smallest options, with two bits and more where there are so many.

    The loss of one bit is so large that it says little of those of more bits.
    """

    def choose(options: Sequence[Option], dense: int) -> list[int]:
        finer = [index for index, option in enumerate(options) if option.choice.bits != 1]
        return (finer if len(finer) >= count else list(range(len(options))))[:count]

    return choose


@dataclass(frozen=True)
class JointOption(Option):
    """One way to store the targets of a unit together; `choice` and `nbytes` are those of the whole unit.

    Args:
        members: the option of each member, in the unit's order. A member whose choice is dense is not compressed, and is left
            out when the others are solved.
    """

    members: tuple[Option, ...] = ()
