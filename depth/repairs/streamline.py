"""LLM-Streamline: the first layer of a run is kept and trained to replace the whole run.

It starts from its original weights and learns, by the squared error of the hidden state, to put out what the run's last layer
put out. The score chooses one layer more, so that as many layers are dropped as were asked for. The checkpoint stays plain.

When to use: where there is an hour for training. Cost: the calibration set's hidden states at both ends of the run in memory,
and some three forwards of one layer per token and epoch.

Source: Chen et al., Streamlining Redundant Layers, arXiv 2403.19135 (§3.2: AdamW, 2e-4 falling in a cosine, weight decay 1e-3,
batches of 128 × 2048 tokens; more but smaller steps here, since calibration is small). Differences: after a warm-up the rate
falls to a tenth and not to 5e-5, gradients are clipped at 1 and not 5; the recipe's score `angular-all` takes the mean angle of
all tokens, where the authors take the mean cosine.
"""

from __future__ import annotations

from ..base import Training, repair


@repair("streamline", source="arXiv 2403.19135", on="layer")
def settings(training: Training) -> Training:
    """The paper's learning rate and weight decay."""
    return training.filled(lr=2e-4, epochs=4, batch_tokens=8192, patience=2, weight_decay=1e-3)
