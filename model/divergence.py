"""Kullback-Leibler divergence of a changed model's predictions from the original's, in nats.

Compressing a single target changes predictions by 1e-4 to 1e-2 nats per token, and cross entropies are of the order of ten. So
the divergence is summed from differences of logarithms, word by word, and never as the difference of two sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_AT_ONCE = 1 << 20  # logits processed at a time: they fit in a processor's cache, which is three times as fast


class Predictions:
    """The original's predictions over some tokens, with which several changed models are compared.

    Args:
        logits: (windows, tokens, words), any floating dtype.
    """

    def __init__(self, logits: Tensor) -> None:
        self._words = logits.float().log_softmax(-1)

    def __len__(self) -> int:
        return self._words.shape[0] * self._words.shape[1]

    def divergence(self, logits: Tensor) -> float:
        """Σ over tokens of KL(original ‖ changed), nats; `logits` (windows, tokens, words) of the changed model."""
        windows = zip(self._words, logits, strict=True)
        return max(0.0, sum(_of_rows(true[rows], mine[rows]) for true, mine in windows for rows in _parts(*mine.shape)))


def divergence(original: Tensor, changed: Tensor, slope: Tensor | None = None) -> float:
    """Σ over tokens of KL(original ‖ changed), nats, without a float32 copy of either.

    Args:
        original: (tokens, words) logits, any floating dtype.
        changed: (tokens, words) logits.
        slope: (tokens, words), filled with the derivative in `changed` where it is given.
    """
    total = 0.0
    for rows in _parts(*changed.shape):
        words = original[rows].to(changed.device, torch.float32).log_softmax(-1)
        total += _of_rows(words, changed[rows], None if slope is None else slope[rows])
    return total


def _parts(tokens: int, words: int) -> Iterator[slice]:
    step = max(1, _AT_ONCE // words)
    return (slice(start, start + step) for start in range(0, tokens, step))


def _of_rows(true: Tensor, logits: Tensor, slope: Tensor | None = None) -> float:
    """The sum over these tokens; `true` holds the original's logarithms."""
    p, mine = true.exp(), logits.float().log_softmax(-1)
    if slope is not None:
        slope.copy_(mine.exp().sub_(p))
    return -float(mine.sub_(true).mul_(p).sum(-1).sum(dtype=torch.float64))
