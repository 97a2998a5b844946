"""How far a changed model's predictions are from the original's, in nats.

Single targets change predictions by 1e-4 to 1e-2 nats per token, where cross entropies are of the order of ten: the divergence
is summed from differences of logarithms, word by word, and never as the difference of two sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 1 << 24  # logits that are widened together


class Predictions:
    """The original's predictions over some tokens, for others to be compared with.

    Args:
        logits: (tokens, words), any floating dtype.
    """

    def __init__(self, logits: Tensor) -> None:
        self._words = logits.float().log_softmax(-1)

    def __len__(self) -> int:
        return len(self._words)

    def divergence(self, logits: Tensor) -> float:
        """Σ over tokens of KL(original ‖ changed), nats; `logits` (tokens, words) of the changed model."""
        total, step = 0.0, max(1, _AT_ONCE // logits.shape[-1])
        for rows in (slice(start, start + step) for start in range(0, len(logits), step)):
            true = self._words[rows]
            total += float((true.exp() * (true - logits[rows].float().log_softmax(-1))).sum(-1).sum(dtype=torch.float64))
        return max(total, 0.0)
