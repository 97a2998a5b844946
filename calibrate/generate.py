"""Text that the model itself writes, as calibration data (`calibration.source: self`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoint.hf_quantizer import open_model
from ..model.view import require_positions
from .data import WRITTEN_TOGETHER


def generator(
    model: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> Callable[[int, int, int], Tensor]:
    """A function (samples, length, seed) -> (samples, length) int64 tokens sampled from the model at temperature 1.

    The model is loaded whole, and only when the function is called: generating needs every layer for every token.
    """

    def generate(samples: int, length: int, seed: int) -> Tensor:
        """Tokens that the model itself writes."""
        loaded, tokenizer = open_model(model, dtype=dtype, device=str(device), trust_remote_code=trust_remote_code)
        require_positions(loaded.config, length, "calibration.length")
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        forbidden = [loaded.generation_config.eos_token_id]
        suppressed = [i for entry in forbidden if entry is not None for i in (entry if isinstance(entry, list) else [entry])]
        rows = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
            torch.manual_seed(seed)
            for first in range(0, samples, WRITTEN_TOGETHER):
                ids = torch.full(
                    (min(WRITTEN_TOGETHER, samples - first), 1), 0 if start is None else start, device=loaded.device
                )
                # a sample has `length` tokens, so the end-of-text token is never drawn
                rows.append(
                    loaded.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=length - 1,
                        min_new_tokens=length - 1,
                        do_sample=True,
                        temperature=1.0,
                        top_k=0,
                        top_p=1.0,
                        suppress_tokens=suppressed or None,
                        pad_token_id=0,
                    ).cpu()
                )
        return torch.cat(rows)

    return generate
