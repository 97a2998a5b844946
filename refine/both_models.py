"""The calls of a layer in the original model and in the compressed one, side by side.

Both models run layer by layer on the same tokens, so that a compressed layer can be trained towards the original's output
(`refine_block` in refine/objectives.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.lockstep import Call
from .objectives import BlockExamples


@dataclass(frozen=True)
class Pair:
    """The calls of one layer in both models, batch by batch; the last `held` of each are held out."""

    original: Sequence[Call]
    compressed: Sequence[Call]
    held: int

    @classmethod
    def of(cls, calls: Sequence[Call], held: int) -> Pair:
        """From all calls in a row: the original's, then the compressed model's."""
        count = len(calls) // 2
        return cls(calls[:count], calls[count:], held)

    @property
    def trained(self) -> int:
        """Batches that are not held out."""
        return len(self.original) - self.held

    def read(self, sequential: bool) -> tuple[Sequence[Call], Sequence[Call]]:
        """(The calls that statistics are taken from, the other calls for which the original layer's outputs are needed)."""
        if sequential:
            return self.compressed[: self.trained], self.original
        return self.original[: self.trained], self.original[self.trained :]

    def split(self, goals: Sequence[Tensor]) -> tuple[BlockExamples, BlockExamples]:
        """The compressed model's calls and their goals: (those to train on, those held out)."""
        at = self.trained
        return BlockExamples(self.compressed[:at], goals[:at]), BlockExamples(self.compressed[at:], goals[at:])


def restored(layer: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer with its forms installed the stored values of all other tensors (norms and biases that were refined)."""
    state = layer.state_dict()
    with torch.no_grad():
        for key, value in tensors.items():
            held = state.get(key.removeprefix(name + "."))
            if held is not None and held.shape == value.shape:
                held.copy_(value)
