"""Two methods, one after the other: what the first factored or pruned, the second compresses again.

A recipe of two steps, such as `svd-llm` and then `gptq`, first finds low-rank factors and then treats each factor as a weight
of its own. The right factor reads the target's input; the left one reads what the compressed right factor puts out, and is
fitted to it anew before it is compressed, so that it makes up for what the right one lost. Where the first step leaves fewer
channels (`nystrom`), the smaller matrix is a weight of its own, on the channels that it still reads.

Source: the order (compress right, refit left on its outputs, compress left) is that of SVD-LLM's combination with GPTQ (arXiv
2403.07378 §4) with the refit of CALDERA (arXiv 2405.18886); the refit is the least-squares solution on the gram's range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .base import GroupStats, Joint, Method, Settings, Solution, TargetStats
from .channels.base import gone_biases, pruned_shape
from .forms.base import Dense, Form, LowRank
from .forms.product import Product
from .forms.pruned import Pruned
from .options import Choice, JointOption, Option, Shape, at_shares

# what can be told of a factor's input from the target's own statistics
DERIVED = frozenset({"gram", "output_gram", "mean", "mean_square"})
_ALWAYS = frozenset({"gram"})  # what the inputs of factors, and the second step's metric, are derived from
_ANY = Shape(512, 512, 2)  # steps that do not fit each other do so at no shape
_HELD = 3  # forms of a target that are kept, since a loss is asked for and then the form
_RANGE = 1e-10  # eigenvalues below this part of the largest one are no information about the input


class ChainSettings(Settings):
    """Settings of both steps."""

    first: Settings
    second: Settings


def chain(first: Method, second: Method) -> Method:
    """The method that applies `second` to what `first` leaves: both factors, or the smaller matrices of pruned channels.

    Raises:
        ValueError: `second` needs statistics that cannot be told for a factor's input, or the members of a set of `first`
            share something.
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

    def solve(weight: Tensor, stats: TargetStats, settings: Any) -> Chained:
        return Chained(first.solve(weight, stats, settings.first), second, settings.second, weight, stats)

    def options(shape: Shape, settings: Any, multiple: int) -> list[Option]:
        """Every rank of the first step, with both factors at the size that the second gives them."""
        found = [
            _smaller(first, option, shape, second, settings.second) for option in first.options(shape, settings.first, multiple)
        ]
        return [option for option in found if option.nbytes < shape.nbytes]

    needs = first.needs | second.needs | _ALWAYS
    source = f"{first.source}; {second.source}"
    name, joint = f"{first.name}+{second.name}", _joint(first, second)
    measured = at_shares(0.25, 0.5, 0.85) if joint is None else at_shares(0.5, 0.85)  # where probes look too (run/probe.py)
    return Method(name, solve, ChainSettings, needs, source, options, measured, steps=(first, second), joint=joint)


def _joint(first: Method, second: Method) -> Joint | None:
    """The sets of the first step, each member's form compressed by the second."""
    joint = first.joint
    if joint is None:
        return None

    def options(shapes: Sequence[Shape], parts: Sequence[str], settings: Any, multiple: int) -> list[JointOption]:
        """Those of the first step, each member at the size that the second gives it."""
        found = []
        for option in joint.options(shapes, parts, settings.first, multiple):
            members = []
            for member, shape, part in zip(option.members, shapes, parts, strict=True):
                if member.choice.channels is not None:
                    left = pruned_shape(shape, part, shapes[-1].in_features, member.choice.channels)
                    nbytes = _only(second, left, settings.second).nbytes - gone_biases(shape, left)
                    members.append(Option(member.choice, nbytes, halfway=member.nbytes))
                else:
                    members.append(member if member.choice.dense else _smaller(first, member, shape, second, settings.second))
            found.append(JointOption(option.choice, sum(member.nbytes for member in members), tuple(members)))
        return [option for option in found if option.nbytes < sum(shape.nbytes for shape in shapes)]

    def solve(
        weights: Sequence[Tensor], statistics: Sequence[TargetStats], parts: Sequence[str], settings: Any
    ) -> Sequence[Solution]:
        solved = joint.solve(weights, statistics, parts, settings.first)
        return [Chained(each, second, settings.second, w, s) for each, w, s in zip(solved, weights, statistics, strict=True)]

    needs = {part: first.needs_of(part) | second.needs | _ALWAYS for part in joint.needs}
    return Joint(lambda targets, settings: joint.sets(targets, settings.first), options, solve, shares=False, needs=needs)


def _smaller(first: Method, option: Option, shape: Shape, second: Method, settings: Settings) -> Option:
    """An option of the first step with what it leaves at the size that the second gives it."""
    if (rank := option.choice.rank) is not None:
        plain = rank * (shape.out_features + shape.in_features) * shape.element
        parts = [_only(second, part, settings) for part in _parts(shape, rank)]
        return Option(option.choice, option.nbytes - plain + sum(part.nbytes for part in parts), halfway=option.nbytes)
    raise ValueError(f"{second.name} cannot follow {first.name}, which leaves no factors to compress")


def _parts(shape: Shape, rank: int) -> tuple[Shape, Shape]:
    return Shape(rank, shape.in_features, shape.element), Shape(shape.out_features, rank, shape.element)


def _only(method: Method, shape: Shape, settings: Settings) -> Option:
    """The one way in which the second method stores a factor; dense where it has none that is smaller."""
    options = method.options(shape, settings, 1)
    if len(options) > 1:
        raise ValueError(f"as a second step {method.name} needs settings that fix its size (a rank, bits)")
    return options[0] if options else Option(Choice(), shape.nbytes)


@dataclass(frozen=True)
class Chained(Solution):
    """Factors or a pruned matrix by the first solution, compressed by the second method."""

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
            error = error[form.rows]  # nobody reads the rows that are gone; the matrix that did answers for them
        return float(((error @ gram) * error).sum())

    @property
    def total(self) -> float:
        weight = self.weight.double()
        return float(((weight @ _gram(self.stats)) * weight).sum())

    def form(self, choice: Choice) -> Form:
        """Both factors by the second step, or the smaller matrix."""
        if choice not in self._last:
            while len(self._last) >= _HELD:
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
        right_shape, left_shape = _parts(shape, low.right.shape[0])
        right = self._compress(low.right, GroupStats(group.tokens, _gram(self.stats), group.mean), right_shape)
        z = right.dense().double()
        gram = z @ _gram(self.stats) @ z.T
        mean = None if group.mean is None else z @ group.mean.double()
        rest = self.weight.double() - low.left.double() @ z  # what calibration did not see stays as the first step left it
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
        gram: (n, n) mean of z zᵀ; directions without energy are left out.
    """
    values, vectors = torch.linalg.eigh(gram)
    seen = values > _RANGE * values[-1].clamp_min(0)
    kept = vectors[:, seen]
    return (cross @ kept / values[seen]) @ kept.T


def combine(steps: Sequence[tuple[Method, Settings]]) -> tuple[Method, Settings]:
    """One method out of a recipe's one or two steps, with its settings.

    Raises:
        ValueError: as `chain`.
    """
    if len(steps) == 1:
        return steps[0]
    (first, first_settings), (second, second_settings) = steps
    return chain(first, second), ChainSettings(first=first_settings, second=second_settings)


def require_fit(both: Method, settings: Settings) -> None:
    """Refuse two steps, combined, of which the second cannot store what the first one leaves.

    Raises:
        ValueError: there are no factors, or their size is left open.
    """
    both.options(_ANY, settings, 1)
