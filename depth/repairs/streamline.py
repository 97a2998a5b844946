"""LLM-Streamline: the first of a run of layers stays, and is trained to do what the whole run did.

It starts as it is and learns, by the squared error of the hidden state, to give what the last layer of the run gave. A run of
one more layer is chosen, so that as many layers go as were asked for. The checkpoint stays plain.

When to use: where an hour of training is to be had. Cost: calibration's hidden states at both ends of the run in memory, and
some three forwards of one layer per token and epoch.

Source: Chen et al., Streamlining Redundant Layers, arXiv 2403.19135 (§3.2: AdamW, 2e-4 falling in a cosine, weight decay 1e-3,
batches of 128 × 2048 tokens; more but smaller steps here, since calibration is small). Differences: the rate falls to a tenth
and not to 5e-5, after a warm-up, gradients are clipped at 1 and not 5; `angular-all`, the recipe's score, takes the mean angle
of all tokens, where the authors take their mean cosine.
"""

from __future__ import annotations

from ..base import Training, repair


@repair("streamline", source="arXiv 2403.19135", on="layer")
def settings(training: Training) -> Training:
    """The paper's learning rate and weight decay."""
    return training.filled(lr=2e-4, epochs=4, batch_tokens=8192, patience=2, weight_decay=1e-3)
