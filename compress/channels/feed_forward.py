"""What a layer's targets are to each other: its attention and its feed-forward, told from paths, groups and shapes.

No list of architectures: a path inside the layer that names attention ('self_attn', 'attention') makes a target part of it, as
every decoder of transformers has it; the rest is told from who reads one input and which width fits which. What does not fit
is nobody's, and the caller says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..base import Joinable, TargetSet

# what the targets of a feed-forward are to it
GATE_UP, MAKER, READER = "gate and up", "up", "down"


@dataclass(frozen=True)
class FeedForward:
    """The targets of one feed-forward.

    Args:
        makers: those that make the inner channels: gate and up, or one of both ('gate_up': the first half of its rows is the
            gate), or one alone.
        reader: the one that reads them.
        fused: whether the one maker holds gate and up.
    """

    makers: tuple[Joinable, ...]
    reader: Joinable
    fused: bool

    def as_set(self) -> TargetSet:
        """Its targets as one set, the reader last."""
        names = (*(maker.name for maker in self.makers), self.reader.name)
        return TargetSet(names, (GATE_UP if self.fused else MAKER,) * len(self.makers) + (READER,))


def in_attention(role: str) -> bool:
    """Whether a path inside a layer names attention."""
    return any("attn" in part or "attention" in part for part in role.lower().split(".")[:-1])


def by_layer(targets: Sequence[Joinable]) -> list[list[Joinable]]:
    """The targets of each layer, in their order."""
    found: dict[int, list[Joinable]] = {}
    for target in targets:
        found.setdefault(target.layer, []).append(target)
    return list(found.values())


def by_group(targets: Sequence[Joinable]) -> list[list[Joinable]]:
    """The targets that read one input together, in the order of their first readers."""
    found: dict[str, list[Joinable]] = {}
    for target in targets:
        found.setdefault(target.group, []).append(target)
    return list(found.values())


def feed_forwards(layer: Sequence[Joinable]) -> list[FeedForward]:
    """The feed-forwards among the targets of one layer, attention aside; each expert of a mixture is one.

    One is recognised where a group of one or two equal makers is followed by a single reader under the same path, as wide as
    they make it, which puts out what they read; and where no channel of it is bound (a norm between them would have to be cut
    too).
    """
    groups = by_group([target for target in layer if not in_attention(target.role) and target.expert is None])
    pairs = [*pairwise(groups), *_experts(layer)]
    found = (_feed_forward(makers, readers) for makers, readers in pairs)
    return [each for each in found if each is not None]


def _experts(layer: Sequence[Joinable]) -> list[tuple[list[Joinable], list[Joinable]]]:
    """First and second matrix of each expert, where it has two."""
    by_expert: dict[tuple[str, int], list[Joinable]] = {}
    for target in layer:
        if target.expert is not None:
            by_expert.setdefault((target.role.rpartition(".")[0], target.expert), []).append(target)
    return [([pair[0]], [pair[1]]) for pair in by_expert.values() if len(pair) == 2]


def _feed_forward(makers: Sequence[Joinable], readers: Sequence[Joinable]) -> FeedForward | None:
    reader, inner = readers[0], makers[0].out_features
    same_path = {target.role.rpartition(".")[0] for target in (*makers, *readers)}
    equal = len({target.out_features for target in makers}) == 1 and len(makers) <= 2
    if len(makers) < makers[0].siblings:  # another one is kept dense, and with it every channel
        return None
    if len(readers) > 1 or len(same_path) > 1 or not equal or reader.out_features != makers[0].in_features or reader.bound:
        return None
    if reader.in_features == inner:
        return FeedForward(tuple(makers), reader, fused=False)
    if 2 * reader.in_features == inner and len(makers) == 1:
        return FeedForward(tuple(makers), reader, fused=True)
    return None
