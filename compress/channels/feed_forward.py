"""Which targets of a layer are its attention and which its feed-forward, told from paths, groups and shapes.

There is no list of architectures. A target is part of attention if its path inside the layer names attention ('self_attn',
'attention'), as in every decoder of transformers. Feed-forwards are recognised by which targets read one input and by widths
that fit. Targets that fit neither are left to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..base import Joinable, JointUnit

# the slots of a feed-forward: gate and up in one matrix; gate or up; down
GATE_UP, UP, DOWN = "gate and up", "up", "down"


@dataclass(frozen=True)
class FeedForward:
    """The targets of one feed-forward.

    Args:
        up: the matrices that make the inner channels: gate and up; both in one matrix ('gate_up', whose first half of rows is
            the gate); or up alone.
        down: the down projection, which reads the inner channels.
        fused: whether gate and up are one matrix.
    """

    up: tuple[Joinable, ...]
    down: Joinable
    fused: bool

    def as_unit(self) -> JointUnit:
        """Its targets as one unit, the down projection last."""
        names = (*(target.name for target in self.up), self.down.name)
        return JointUnit(names, (GATE_UP if self.fused else UP,) * len(self.up) + (DOWN,))


def in_attention(role: str) -> bool:
    """Whether a path inside a layer names attention."""
    return any("attn" in name or "attention" in name for name in role.lower().split(".")[:-1])


def by_layer(targets: Sequence[Joinable]) -> list[list[Joinable]]:
    """The targets of each layer, in their order."""
    found: dict[int, list[Joinable]] = {}
    for target in targets:
        found.setdefault(target.layer, []).append(target)
    return list(found.values())


def by_group(targets: Sequence[Joinable]) -> list[list[Joinable]]:
    """The targets that read one input, group by group, in the order of each group's first target."""
    found: dict[str, list[Joinable]] = {}
    for target in targets:
        found.setdefault(target.group, []).append(target)
    return list(found.values())


def feed_forwards(layer: Sequence[Joinable]) -> list[FeedForward]:
    """The feed-forwards among the targets of one layer; each expert of a mixture of experts is one.

    A feed-forward is recognised where, outside attention, a group of one or two equally wide matrices is followed by a single
    matrix under the same path that has as many inputs as they have outputs, and as many outputs as they have inputs. It is not
    recognised where its channels are bound, because a norm between its matrices would have to be pruned too.
    """
    groups = by_group([target for target in layer if not in_attention(target.role) and target.expert is None])
    pairs = [*pairwise(groups), *_experts(layer)]
    found = (_feed_forward(first, second) for first, second in pairs)
    return [each for each in found if each is not None]


def _experts(layer: Sequence[Joinable]) -> list[tuple[list[Joinable], list[Joinable]]]:
    """The first and the second matrix of each expert that has two."""
    by_expert: dict[tuple[str, int], list[Joinable]] = {}
    for target in layer:
        if target.expert is not None:
            by_expert.setdefault((target.role.rpartition(".")[0], target.expert), []).append(target)
    return [([pair[0]], [pair[1]]) for pair in by_expert.values() if len(pair) == 2]


def _feed_forward(up: Sequence[Joinable], readers: Sequence[Joinable]) -> FeedForward | None:
    down, inner = readers[0], up[0].out_features
    same_path = {target.role.rpartition(".")[0] for target in (*up, *readers)}
    equal = len({target.out_features for target in up}) == 1 and len(up) <= 2
    if len(up) < up[0].siblings:  # gate or up is kept dense, and needs every channel
        return None
    if len(readers) > 1 or len(same_path) > 1 or not equal or down.out_features != up[0].in_features or down.bound:
        return None
    if down.in_features == inner:
        return FeedForward(tuple(up), down, fused=False)
    if 2 * down.in_features == inner and len(up) == 1:
        return FeedForward(tuple(up), down, fused=True)
    return None
