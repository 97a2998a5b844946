"""Chains: a second method compresses what the first one left.

A recipe of two steps, such as `svd-llm` and then `gptq`, first finds low-rank factors and then treats each factor as a weight
of its own. The right factor reads the target's input. The left factor reads the output of the compressed right factor; it is
refitted to that output before it is compressed itself, and so makes up for the error of the right one. Where the first step
prunes channels (`nystrom`), the smaller matrix is compressed as a weight that reads the channels that were kept.

Source: the order (compress right, refit left on its outputs, compress left) is that of SVD-LLM's combination with GPTQ (arXiv
2403.07378 §4) with the refit of CALDERA (arXiv 2405.18886). The refit is the least-squares solution on the gram's range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .base import GroupStats, Joinable, Joint, JointUnit, Method, Settings, Solution, TargetStats
from .channels.base import gone_biases, pruned_shape
from .forms.base import Dense, Form, LowRank
from .forms.product import Product
from .forms.pruned import Pruned
from .options import Choice, JointOption, Option, Shape, at_shares

# the statistics of a factor's input that follow from the target's own statistics
DERIVED = frozenset({"gram", "output_gram", "mean", "mean_square"})
_ALWAYS = frozenset({"gram"})  # the inputs of the factors, and the metric of the second step, are derived from it
_ANY = Shape(512, 512, 2)  # whether two steps fit each other does not depend on the shape
_CACHED = 3  # forms of one target that are cached, because the form is often asked for after its loss
_RANGE = 1e-10  # eigenvalues below this fraction of the largest one carry no information about the input


class ChainSettings(Settings):
    """The settings of both steps."""

    first: Settings
    second: Settings

    def remarks(self) -> list[str]:
        return list(dict.fromkeys([*self.first.remarks(), *self.second.remarks()]))


def chain(first: Method, second: Method) -> Method:
    """The method that applies `second` to what `first` leaves: to both factors, or to the pruned matrices.

    Raises:
        ValueError: `second` needs statistics that cannot be derived for a factor's input, `second` solves several targets
            together, or `first` stores a factor for several targets together.
    """
    if second.joint is not None or (first.joint is not None and not first.joint.separable):
        name = second.name if second.joint is not None else first.name
        raise ValueError(f"{name} solves several targets at once and cannot be one of two steps")
    missing = second.needs - DERIVED
    if missing:
        raise ValueError(
            f"{second.name} cannot follow {first.name}: it needs {', '.join(sorted(missing))}, which calibration does not know "
            "of a factor's input"
        )
    alone = ChainAlone(first, second)
    joint = None if first.joint is None else ChainJoint(first, first.joint, second)
    return Method(
        f"{first.name}+{second.name}",
        alone.solve,
        ChainSettings,
        first.needs | second.needs | _ALWAYS,
        f"{first.source}; {second.source}",
        alone.options,
        at_shares(0.25, 0.5, 0.85) if joint is None else at_shares(0.5, 0.85),  # the sizes that run/losses/probe.py probes, too
        steps=(first, second),
        joint=None if joint is None else Joint(joint.units, joint.options, joint.solve, shares=False, needs=joint.needs),
    )


@dataclass(frozen=True)
class ChainAlone:
    """How a chain treats a target that is solved alone."""

    first: Method
    second: Method

    def options(self, shape: Shape, settings: ChainSettings, multiple: int) -> list[Option]:
        """Every rank of the first step, with both factors at the size that the second step gives them."""
        found = [
            _compressed(self.first, option, shape, self.second, settings.second)
            for option in self.first.options(shape, settings.first, multiple)
        ]
        return [option for option in found if option.nbytes < shape.nbytes]

    def solve(self, weight: Tensor, stats: TargetStats, settings: ChainSettings) -> Chained:
        """The target by the first step; its factors are compressed when a form is asked for."""
        return Chained(self.first.solve(weight, stats, settings.first), self.second, settings.second, weight, stats)


@dataclass(frozen=True)
class ChainJoint:
    """How a chain treats the units of its first step: the second step compresses each member's form.

    Args:
        first: the first step.
        units_of_first: how the first step solves targets together.
        second: the second step.
    """

    first: Method
    units_of_first: Joint
    second: Method

    @property
    def needs(self) -> dict[str, frozenset[str]]:
        """Slot -> the statistics that either step reads of the members that fill it."""
        return {slot: self.first.needs_of(slot) | self.second.needs | _ALWAYS for slot in self.units_of_first.needs}

    def units(self, targets: Sequence[Joinable], settings: ChainSettings) -> list[JointUnit]:
        """The units of the first step."""
        return self.units_of_first.units(targets, settings.first)

    def options(
        self, shapes: Sequence[Shape], slots: Sequence[str], settings: ChainSettings, multiple: int
    ) -> list[JointOption]:
        """The options of the first step, each member at the size that the second step gives it."""
        inner = shapes[-1].in_features
        found = []
        for option in self.units_of_first.options(shapes, slots, settings.first, multiple):
            each = zip(option.members, shapes, slots, strict=True)
            members = tuple(self._member(member, shape, slot, inner, settings.second) for member, shape, slot in each)
            found.append(JointOption(option.choice, sum(member.nbytes for member in members), members))
        return [option for option in found if option.nbytes < sum(shape.nbytes for shape in shapes)]

    def _member(self, member: Option, shape: Shape, slot: str, inner: int, settings: Settings) -> Option:
        """A member's option of the first step, at the size that the second step gives it."""
        if member.choice.channels is not None:
            left = pruned_shape(shape, slot, inner, member.choice.channels)
            nbytes = _only(self.second, left, settings).nbytes - gone_biases(shape, left)
            return Option(member.choice, nbytes, halfway=member.nbytes)
        return member if member.choice.dense else _compressed(self.first, member, shape, self.second, settings)

    def solve(
        self, weights: Sequence[Tensor], statistics: Sequence[TargetStats], slots: Sequence[str], settings: ChainSettings
    ) -> Sequence[Solution]:
        """The members by the first step; their forms are compressed when they are asked for."""
        solved = self.units_of_first.solve(weights, statistics, slots, settings.first)
        each = zip(solved, weights, statistics, strict=True)
        return [Chained(first, self.second, settings.second, weight, stats) for first, weight, stats in each]


def _compressed(first: Method, option: Option, shape: Shape, second: Method, settings: Settings) -> Option:
    """An option of the first step, with its factors at the size that the second step gives them.

    Raises:
        ValueError: the option has no factors.
    """
    if (rank := option.choice.rank) is None:
        raise ValueError(f"{second.name} cannot follow {first.name}, which leaves no factors to compress")
    plain = rank * (shape.out_features + shape.in_features) * shape.element
    factors = [_only(second, factor, settings) for factor in _factor_shapes(shape, rank)]
    return Option(option.choice, option.nbytes - plain + sum(factor.nbytes for factor in factors), halfway=option.nbytes)


def _factor_shapes(shape: Shape, rank: int) -> tuple[Shape, Shape]:
    """Of the right factor and of the left one."""
    return Shape(rank, shape.in_features, shape.element), Shape(shape.out_features, rank, shape.element)


def _only(method: Method, shape: Shape, settings: Settings) -> Option:
    """The single option that the second step has for a factor; the dense one where it has none that is smaller.

    Raises:
        ValueError: it has several, because its settings leave the size open.
    """
    options = method.options(shape, settings, 1)
    if len(options) > 1:
        raise ValueError(f"as a second step {method.name} needs settings that fix its size (a rank, bits)")
    return options[0] if options else Option(Choice(), shape.nbytes)


@dataclass(frozen=True)
class Chained(Solution):
    """One target: its factors or its pruned matrix by the first step, compressed by the second one.

    Args:
        first: the solution of the first step.
        second: the method of the second step.
        settings: of the second step.
        weight: (out, in), the original one; losses are measured against it.
        stats: of the target; its gram is needed.
    """

    first: Solution
    second: Method
    settings: Settings
    weight: Tensor
    stats: TargetStats
    _last: dict[Choice, Form] = field(default_factory=dict, init=False, repr=False, compare=False)

    def loss(self, choice: Choice) -> float:
        form, gram = self.form(choice), _gram(self.stats)
        error = self.weight.double() - form.dense().double()
        if isinstance(form, Pruned):
            error = error[form.rows]  # the loss of the pruned rows is counted at the matrix that reads these channels
        return float(((error @ gram) * error).sum())

    @property
    def total(self) -> float:
        weight = self.weight.double()
        return float(((weight @ _gram(self.stats)) * weight).sum())

    def form(self, choice: Choice) -> Form:
        """Both factors, or the pruned matrix, as the second step stores them."""
        if choice not in self._last:
            while len(self._last) >= _CACHED:
                del self._last[next(iter(self._last))]
            self._last[choice] = self._formed(choice)
        return self._last[choice]

    def _formed(self, choice: Choice) -> Form:
        low = self.first.form(choice)
        if isinstance(low, Pruned):
            return self._of_pruned(low)
        if not isinstance(low, LowRank):
            raise ValueError(f"{self.second.name} compresses low-rank factors, not a {low.kind} form")
        group, element = self.stats.group, self.weight.element_size()
        shape = Shape(*self.weight.shape, element)  # type: ignore[call-arg]
        right_shape, left_shape = _factor_shapes(shape, low.right.shape[0])
        right = self._compress(low.right, GroupStats(group.tokens, _gram(self.stats), group.mean), right_shape)
        z = right.dense().double()
        gram = z @ _gram(self.stats) @ z.T
        mean = None if group.mean is None else z @ group.mean.double()
        rest = self.weight.double() - low.left.double() @ z
        # directions of z without energy have nothing to fit: there left keeps what the first step gave it
        left = low.left.double() + refit(rest @ _gram(self.stats) @ z.T, gram)
        return Product(
            self._compress(left, GroupStats(group.tokens, gram, mean), left_shape).with_bias(low.bias), right, z.shape[0]
        )

    def _of_pruned(self, left: Pruned) -> Form:
        group, reads = self.stats.group, left.columns
        seen = GroupStats(
            group.tokens, _gram(self.stats)[reads[:, None], reads], None if group.mean is None else group.mean[reads]
        )
        shape = Shape(len(left.rows), len(left.columns), self.weight.element_size())
        return replace(left, form=self._compress(left.form.dense(), seen, shape))

    def _compress(self, factor: Tensor, group: GroupStats, shape: Shape) -> Form:
        option = _only(self.second, shape, self.settings)
        if option.choice.dense:
            return Dense(factor)
        if group.gram is not None:
            group.mean_square = group.gram.diagonal()
        return self.second.solve(factor, TargetStats(group), self.settings).form(option.choice)


def _gram(stats: TargetStats) -> Tensor:
    if stats.group.gram is None:
        raise ValueError("a second step needs the gram of the target's input")
    return stats.group.gram.double()


def refit(cross: Tensor, gram: Tensor) -> Tensor:
    """`cross gram⁺`, the least-squares map from inputs with this gram: (out, n) float64.

    Args:
        cross: (out, n) mean of y zᵀ.
        gram: (n, n) mean of z zᵀ; its directions without energy are left out.
    """
    values, vectors = torch.linalg.eigh(gram)
    seen = values > _RANGE * values[-1].clamp_min(0)
    kept = vectors[:, seen]
    return (cross @ kept / values[seen]) @ kept.T


def combine(steps: Sequence[tuple[Method, Settings]]) -> tuple[Method, Settings]:
    """The method of a recipe's one or two steps, and its settings.

    Raises:
        ValueError: two steps that cannot follow each other; see `chain`.
    """
    if len(steps) == 1:
        return steps[0]
    (first, first_settings), (second, second_settings) = steps
    return chain(first, second), ChainSettings(first=first_settings, second=second_settings)


def require_fit(both: Method, settings: Settings) -> None:
    """Refuse a chain whose second step cannot store what the first one leaves.

    Raises:
        ValueError: the first step leaves no factors, or the second step's settings leave their size open.
    """
    both.options(_ANY, settings, 1)
