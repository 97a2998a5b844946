"""LoRAP: attention by weighted low rank, feed-forwards by pruning channels.

Attention's matrices are of low rank and feed-forwards are not, so each gets what suits it. Attention: SVD with input channels
scaled by √E[x²]; values and output keep three times the fraction of their bytes that queries and keys keep, and stay dense
where that is no saving. Feed-forward: whole inner channels leave, those of least importance first, except that the very least
important ones stay; what is left is an ordinary, smaller feed-forward.

When to use: where the result should run fast without a kernel of its own (a pruned feed-forward is dense), or to compare with
published LoRAP results; the authors train afterwards (LoRA), which lrc does not.

Cost: one SVD per attention matrix; of a feed-forward only norms. Statistics: (in,) per group.

Source: Li et al., LoRAP, arXiv 2404.09695: attention §3.1 with q, k : v, o = 1 : 3; channel importance = sum over gate, up and
down of the norms of |W| · √E[x²], the least important 1 % protected. Differences from the authors' code: the shares are those
of each target's own bytes, so grouped-query keys and values keep their own shape; fused q, k, v have the mean share of their
three parts; feed-forwards are recognised by paths, groups and shapes (compress/channels/feed_forward.py), fused gate and up or
no gate included. What is not recognised is solved by the weighted SVD, and its record says so. Each expert of a mixture is a
feed-forward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..base import Factored, Joinable, Joint, LowRankSolution, Settings, Solution, TargetSet, TargetStats, method
from ..forms.base import LowRank
from ..low_rank.scaled import scaled_svd
from ..options import Choice, JointOption, Option, Shape, break_even, low_rank_options
from .base import Channels, channel_options
from .feed_forward import GATE_UP, MAKER, READER, by_group, by_layer, feed_forwards, in_attention

# what each part keeps, relative to queries; q, k, v in one matrix keep the mean of their three
_QUERY, _KEY, _VALUE, _OUTPUT, _FUSED, _PLAIN = "query", "key", "value", "output", "query, key and value", "attention"
_UNKNOWN = "unknown"
_LETTER = re.compile(r"w?_?([qkv])(?:_?proj|_lin|uery|ey|alue|)$")  # q_proj, wq, query; not qkv_proj or q_a_proj
_NAMES = {"q": _QUERY, "k": _KEY, "v": _VALUE}


class LorapSettings(Settings):
    """Settings of `lorap`."""

    value_share: float = Field(
        3.0, ge=1, le=100, description="fraction kept of values and output, relative to queries and keys"
    )
    protect: float = Field(0.01, ge=0, lt=1, description="part of the channels, the least important, that stays")


def sets(targets: Sequence[Joinable], settings: LorapSettings) -> list[TargetSet]:
    """Attention and feed-forward of each layer, as far as they are recognised; of the rest each target alone."""
    found, taken = [], set[str]()
    for layer in by_layer(targets):
        attention = [target for target in layer if in_attention(target.role) and target.expert is None]
        if attention:
            found.append(TargetSet(tuple(target.name for target in attention), _parts(attention)))
        found += [each.as_set() for each in feed_forwards(layer)]
        taken |= {name for each in found for name in each.names}
        found += [TargetSet((target.name,), (_UNKNOWN,)) for target in layer if target.name not in taken]
    return found


def _parts(attention: Sequence[Joinable]) -> tuple[str, ...]:
    """What the open attention targets of a layer are, in their order: one group of readers, one target that writes back."""
    readers, *writers = by_group(attention)
    letters = [_LETTER.match(target.role.rpartition(".")[2].lower()) for target in readers]
    if len(attention) == 1 or len(writers) > 1 or any(len(group) > 1 for group in writers):
        return (_OUTPUT if len(attention) == 1 else _PLAIN,) * len(attention)
    if all(letters):  # a forward may reach them in any order, and some may be kept dense
        roles = [_NAMES[found[1]] for found in letters if found]
    elif len(readers) in (1, 3):
        roles = [_FUSED] if len(readers) == 1 else [_QUERY, _KEY, _VALUE]
    else:
        return (_PLAIN,) * len(attention)
    known = dict(zip((target.name for target in readers), roles, strict=True))
    return tuple(known.get(target.name, _OUTPUT) for target in attention)


def options(shapes: Sequence[Shape], parts: Sequence[str], settings: LorapSettings, multiple: int = 1) -> list[JointOption]:
    """Of attention: every rank of the first target, the others in proportion; of a feed-forward: every number of channels."""
    if parts[0] == _UNKNOWN:
        return [JointOption(o.choice, o.nbytes, (o,)) for o in low_rank_options(shapes[0], settings, multiple)]
    if READER in parts:
        return channel_options(shapes, parts, multiple)
    dense = sum(shape.nbytes for shape in shapes)
    found: list[JointOption] = []
    for choice, members in _attention_options(shapes, parts, settings, multiple):
        nbytes = sum(member.nbytes for member in members)
        if nbytes < dense and (not found or nbytes > found[-1].nbytes):
            found.append(JointOption(choice, nbytes, tuple(members)))
    return found


def _attention_options(
    shapes: Sequence[Shape], parts: Sequence[str], settings: LorapSettings, multiple: int
) -> list[tuple[Choice, list[Option]]]:
    value = settings.value_share
    shares = {_VALUE: value, _OUTPUT: value, _FUSED: (2 + value) / 3}
    weights = [shares.get(part, 1.0) for part in parts]
    first = shapes[0]
    found = []
    for rank in range(multiple, break_even(first.out_features, first.in_features) + 1, multiple):
        kept = rank * (first.out_features + first.in_features) / (first.out_features * first.in_features) / weights[0]
        found.append(
            (Choice(rank=rank), [_low_rank(shape, kept * w, multiple) for shape, w in zip(shapes, weights, strict=True)])
        )
    return found


def _low_rank(shape: Shape, kept: float, multiple: int) -> Option:
    """The rank that keeps this fraction of a target, at least one step; dense where factors are no smaller."""
    numbers = shape.out_features + shape.in_features
    rank = max(multiple, int(kept * shape.out_features * shape.in_features / numbers + 1e-6) // multiple * multiple)
    if rank > break_even(shape.out_features, shape.in_features):
        return Option(Choice(), shape.nbytes)
    return Option(Choice(rank=rank), rank * numbers * shape.element)


@dataclass(frozen=True)
class Weighted(LowRankSolution):
    """A target by the weighted SVD, with a word on why where that needs one."""

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


def _energy(weight: Tensor, stats: TargetStats, part: str, inner: int) -> Tensor:
    """(inner,) float64: Σ E[x²] W² over what of a target belongs to each channel."""
    assert stats.group.mean_square is not None
    scale = stats.group.mean_square.double()
    if not scale.any():  # an expert that saw no token: its plain norms, as for the weighted SVD
        scale = torch.ones_like(scale)
    if part == READER:
        return weight.double().square().sum(0) * scale
    return (weight.double().square() @ scale).view(-1, inner).sum(0)


def order(importance: Tensor, protect: float) -> Tensor:
    """(channels,) in the order in which they are kept: the protected least important ones, then by falling importance."""
    ascending = importance.sort(stable=True).indices
    protected = int(protect * len(importance))
    return torch.cat([ascending[:protected], ascending[protected:].flip(0)])


def solve_set(
    weights: Sequence[Tensor], statistics: Sequence[TargetStats], parts: Sequence[str], settings: LorapSettings
) -> Sequence[Solution]:
    """Attention's weights (out, in) each by itself; a feed-forward's by one order of its channels."""
    each = list(zip(weights, statistics, parts, strict=True))
    if READER not in parts:
        return [weighted(weight, stats, _remark(part)) for weight, stats, part in each]
    inner = weights[-1].shape[1]
    energies = [_energy(weight, stats, part, inner) for weight, stats, part in each]
    # norms are added up, not squares: the paper's importance; a fused gate and up count as the two that they are
    norms = [_norms(weight, stats, part, inner) for weight, stats, part in each]
    stays = order(torch.stack(norms).sum(0), settings.protect)
    return [Channels(w, energy, stays, part == READER) for (w, _, part), energy in zip(each, energies, strict=True)]


def _norms(weight: Tensor, stats: TargetStats, part: str, inner: int) -> Tensor:
    if part != GATE_UP:
        return _energy(weight, stats, part, inner).sqrt()
    return sum((_energy(half, stats, MAKER, inner).sqrt() for half in weight.split(inner)), torch.zeros(()))


def _remark(part: str) -> str:
    return {
        _UNKNOWN: "neither attention nor a feed-forward whose channels are known: weighted SVD",
        _PLAIN: "attention of another build than q, k, v and o: all its targets keep the same fraction",
    }.get(part, "")


@method(
    "lorap",
    source="arXiv 2404.09695",
    needs=["mean_square"],
    settings=LorapSettings,
    joint=Joint(sets, options, solve_set, shares=False),
)
def solve(weight: Tensor, stats: TargetStats, settings: LorapSettings) -> Weighted:
    """A target (out, in) by itself: the weighted SVD."""
    return weighted(weight, stats)
