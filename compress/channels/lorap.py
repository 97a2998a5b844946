"""LoRAP: attention by weighted low rank, feed-forwards by pruning channels.

Attention matrices are close to low rank, feed-forward matrices are not, so the two are compressed differently. Attention: an
SVD with input channels scaled by √E[x²]. The value and output projections keep three times the fraction of their bytes that the
query and key projections keep; a matrix stays dense where its factors would not be smaller. Feed-forward: whole inner channels
are pruned in the order of their importance, the least important first, except for the very least important 1 %, which are kept.
The result is an ordinary, smaller feed-forward.

When to use: where the result should run fast without a special kernel (a pruned feed-forward is dense), or to compare with
published LoRAP results. The authors fine-tune afterwards (LoRA); lrc does not.

Cost: one SVD per attention matrix; a feed-forward needs only norms. Statistics: (in,) per group.

Source: Li et al., LoRAP, arXiv 2404.09695: attention §3.1 with q, k : v, o = 1 : 3; channel importance = sum over gate, up and
down of the norms of |W| · √E[x²], the least important 1 % protected. Differences from the authors' code: fractions are of each
target's own bytes, so the shapes of grouped-query keys and values are respected; fused q, k, v keep the mean fraction of the
three; feed-forwards are recognised by paths, groups and shapes (feed_forward.py), with fused gate and up or without a gate,
too. A target that is not recognised is compressed by the weighted SVD, and its record says so. Each expert of a mixture of
experts counts as a feed-forward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..base import Factored, Joinable, Joint, JointUnit, LowRankSolution, Settings, Solution, TargetStats, method
from ..forms.base import LowRank
from ..low_rank.svd import scaled_svd
from ..options import Choice, JointOption, Option, Shape, break_even, low_rank_options
from .base import Channels, channel_options
from .feed_forward import DOWN, GATE_UP, UP, by_group, by_layer, feed_forwards, in_attention

# the slots of attention; `_FUSED` is q, k and v in one matrix, `_PLAIN` any matrix of attention of another structure
_QUERY, _KEY, _VALUE, _OUTPUT, _FUSED, _PLAIN = "query", "key", "value", "output", "query, key and value", "attention"
_UNKNOWN = "unknown"  # neither attention nor a feed-forward
_LETTER = re.compile(r"w?_?([qkv])(?:_?proj|_lin|uery|ey|alue|)$")  # q_proj, wq, query; not qkv_proj or q_a_proj
_NAMES = {"q": _QUERY, "k": _KEY, "v": _VALUE}


class LorapSettings(Settings):
    """Settings of `lorap`."""

    value_share: float = Field(
        3.0, ge=1, le=100, description="fraction that value and output projections keep, relative to query and key"
    )
    protect: float = Field(0.01, ge=0, lt=1, description="fraction of the channels, the least important, that is kept")


def units(targets: Sequence[Joinable], settings: LorapSettings) -> list[JointUnit]:
    """Attention and feed-forward of each layer, as far as they are recognised; every other target is a unit of its own."""
    found, taken = [], set[str]()
    for layer in by_layer(targets):
        attention = [target for target in layer if in_attention(target.role) and target.expert is None]
        if attention:
            found.append(JointUnit(tuple(target.name for target in attention), _slots(attention)))
        found += [each.as_unit() for each in feed_forwards(layer)]
        taken |= {name for each in found for name in each.names}
        found += [JointUnit((target.name,), (_UNKNOWN,)) for target in layer if target.name not in taken]
    return found


def _slots(attention: Sequence[Joinable]) -> tuple[str, ...]:
    """The slots of a layer's attention targets, in their order: query, key and value read one input, output comes after."""
    readers, *writers = by_group(attention)
    letters = [_LETTER.match(target.role.rpartition(".")[2].lower()) for target in readers]
    if len(attention) == 1 or len(writers) > 1 or any(len(group) > 1 for group in writers):
        return (_OUTPUT if len(attention) == 1 else _PLAIN,) * len(attention)
    if all(letters):  # a forward pass may reach them in any order, and some may be kept dense
        slots = [_NAMES[found[1]] for found in letters if found]
    elif len(readers) in (1, 3):
        slots = [_FUSED] if len(readers) == 1 else [_QUERY, _KEY, _VALUE]
    else:
        return (_PLAIN,) * len(attention)
    known = dict(zip((target.name for target in readers), slots, strict=True))
    return tuple(known.get(target.name, _OUTPUT) for target in attention)


def options(shapes: Sequence[Shape], slots: Sequence[str], settings: LorapSettings, multiple: int = 1) -> list[JointOption]:
    """Attention: every rank of the first target, the others in proportion. Feed-forward: every number of channels."""
    if slots[0] == _UNKNOWN:
        return [JointOption(o.choice, o.nbytes, (o,)) for o in low_rank_options(shapes[0], settings, multiple)]
    if DOWN in slots:
        return channel_options(shapes, slots, multiple)
    dense = sum(shape.nbytes for shape in shapes)
    found: list[JointOption] = []
    for choice, members in _attention_options(shapes, slots, settings, multiple):
        nbytes = sum(member.nbytes for member in members)
        if nbytes < dense and (not found or nbytes > found[-1].nbytes):
            found.append(JointOption(choice, nbytes, tuple(members)))
    return found


def _attention_options(
    shapes: Sequence[Shape], slots: Sequence[str], settings: LorapSettings, multiple: int
) -> list[tuple[Choice, list[Option]]]:
    value = settings.value_share
    shares = {_VALUE: value, _OUTPUT: value, _FUSED: (2 + value) / 3}
    weights = [shares.get(slot, 1.0) for slot in slots]
    first = shapes[0]
    found = []
    for rank in range(multiple, break_even(first.out_features, first.in_features) + 1, multiple):
        kept = rank * (first.out_features + first.in_features) / (first.out_features * first.in_features) / weights[0]
        found.append(
            (Choice(rank=rank), [_low_rank(shape, kept * w, multiple) for shape, w in zip(shapes, weights, strict=True)])
        )
    return found


def _low_rank(shape: Shape, kept: float, multiple: int) -> Option:
    """The rank that keeps this fraction of a target's bytes, at least `multiple`; dense where the factors are not smaller."""
    numbers = shape.out_features + shape.in_features
    rank = max(multiple, int(kept * shape.out_features * shape.in_features / numbers + 1e-6) // multiple * multiple)
    if rank > break_even(shape.out_features, shape.in_features):
        return Option(Choice(), shape.nbytes)
    return Option(Choice(rank=rank), rank * numbers * shape.element)


@dataclass(frozen=True)
class Weighted(LowRankSolution):
    """A target by the weighted SVD, with a remark where the target was not recognised."""

    factors: Factored
    remark: str = ""

    def form(self, choice: Choice) -> LowRank:
        return self.factors.form(choice)

    @property
    def note(self) -> str:
        return self.remark


def weighted(weight: Tensor, stats: TargetStats, remark: str = "") -> Weighted:
    """The SVD of a weight (out, in) whose input channels are scaled by √E[x²]."""
    assert stats.group.mean_square is not None
    factors = scaled_svd(weight, stats.group.mean_square.double().sqrt())
    return Weighted(factors.energy, factors, remark)


def _energy(weight: Tensor, stats: TargetStats, slot: str, inner: int) -> Tensor:
    """(inner,) float64: Σ E[x²] W² over each channel's row or column of a target."""
    assert stats.group.mean_square is not None
    scale = stats.group.mean_square.double()
    if not scale.any():  # an expert that saw no token: plain norms, as in the weighted SVD
        scale = torch.ones_like(scale)
    if slot == DOWN:
        return weight.double().square().sum(0) * scale
    return (weight.double().square() @ scale).view(-1, inner).sum(0)


def order(importance: Tensor, protect: float) -> Tensor:
    """(channels,) in the order in which they are kept: the protected least important ones, then by descending importance."""
    ascending = importance.sort(stable=True).indices
    protected = int(protect * len(importance))
    return torch.cat([ascending[:protected], ascending[protected:].flip(0)])


def solve_together(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], slots: Sequence[str], settings: LorapSettings
) -> Sequence[Solution]:
    """Attention: each weight (out, in) by itself. Feed-forward: all weights by one ranking of the channels."""
    each = list(zip(weights, statistics, slots, strict=True))
    if DOWN not in slots:
        return [weighted(weight, stats, _remark(slot)) for weight, stats, slot in each]
    inner = weights[-1].shape[1]
    energies = [_energy(weight, stats, slot, inner) for weight, stats, slot in each]
    # the paper's importance adds up norms, not squared norms; fused gate and up count as two matrices
    norms = [_norms(weight, stats, slot, inner) for weight, stats, slot in each]
    ranking = order(torch.stack(norms).sum(0), settings.protect)
    return [Channels(w, energy, ranking, slot == DOWN) for (w, _, slot), energy in zip(each, energies, strict=True)]


def _norms(weight: Tensor, stats: TargetStats, slot: str, inner: int) -> Tensor:
    if slot != GATE_UP:
        return _energy(weight, stats, slot, inner).sqrt()
    return sum((_energy(half, stats, UP, inner).sqrt() for half in weight.split(inner)), torch.zeros(()))


def _remark(slot: str) -> str:
    return {
        _UNKNOWN: "neither attention nor a feed-forward whose channels are known: weighted SVD",
        _PLAIN: "attention of another build than q, k, v and o: all its targets keep the same fraction",
    }.get(slot, "")


@method(
    "lorap",
    source="arXiv 2404.09695",
    needs=["mean_square"],
    settings=LorapSettings,
    joint=Joint(units, options, solve_together, shares=False),
)
def solve(weight: Tensor, stats: TargetStats, settings: LorapSettings) -> Weighted:
    """A target (out, in) by itself: the weighted SVD."""
    return weighted(weight, stats)
