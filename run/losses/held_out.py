"""Perplexity of any model that lrc reads over a few windows, layer by layer: for searches, and for a quick check at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...calibrate.data import Calibration, evaluation_text
from ...calibrate.layerwise import run_batches
from ...calibrate.packing import text_prefix, token_ids
from ...calibrate.sources import TOPICS
from ...checkpoint.hf_quantizer import install_stored
from ...checkpoint.location import Location
from ...model.layerwise import layerwise
from ...model.machine.host_memory import steady_memory
from ...model.machine.precision import full_precision
from ...model.view import ModelView
from ...refine.end_to_end import from_hidden

_AT_ONCE = 2**24  # number of logits that are computed at a time
_QUICK = (2, 512)  # windows of a quick check, and tokens in each
_CHARACTERS = 24_000  # of the text that is tokenised for it


@dataclass(frozen=True)
class QuickCheck:
    """What a finished result lost, roughly.

    Args:
        before, after: token perplexity of the original and of the result.
        tokens: how many were predicted.
        text: what they are from, in words.
    """

    before: float
    after: float
    tokens: int
    text: str


def quick_check(original: ModelView, out: Path, calibration: Calibration, devices: Sequence[torch.device]) -> QuickCheck:
    """Measure the original and its finished result on some thousand tokens that no statistic saw.

    Args:
        original: a fresh view of the original model.
        out: the folder of the result.
        calibration: of the run; its held-out windows are taken where it has some, else a text that comes with Python.

    Raises:
        LrcError: the tokenizer or a model cannot be read.
    """
    count, length = _QUICK
    if len(calibration.held_out):
        windows, text = calibration.held_out[:count, :length], "held-out calibration text"
    else:
        windows, text = _topics(original, count, length), f"a text that calibration did not see ({TOPICS})"
    before = perplexity(original, windows, devices)
    location = Location(str(out), out)
    small = ModelView(location, trust_remote_code=original.trust_remote_code, prepare=install_stored)
    return QuickCheck(before, perplexity(small, windows, devices), windows.numel() - len(windows), text)


def _topics(view: ModelView, count: int, length: int) -> Tensor:
    """(count, length) tokens of the language reference that comes with Python, or fewer of a model with fewer positions."""
    tokenizer: Any = view.location.tokenizer(view.trust_remote_code)
    text = view.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or length
    length = min(length, positions) if positions > 1 else length
    prefix = torch.tensor(text_prefix(tokenizer), dtype=torch.int64)
    ids = token_ids(tokenizer, evaluation_text(TOPICS).text[:_CHARACTERS])
    body = length - len(prefix)
    windows = torch.cat([prefix.expand(count, -1), ids[: count * body].view(count, body)], dim=1)
    view.require_tokens(windows)
    return windows


@full_precision
def perplexity(view: ModelView, windows: Tensor, devices: Sequence[torch.device]) -> float:
    """Token perplexity over windows, computed layer by layer; infinite if the logits are not finite.

    Args:
        view: any model that lrc reads, compressed or not.
        windows: (windows, length) int64 token ids; every token except a window's first is predicted from the tokens before it.
        devices: the devices on which layers run.
    """
    steady_memory()
    batches = windows.split(1)
    with torch.no_grad(), layerwise(view, batches, head=False) as forward:
        for turn in forward:
            with turn.loaded() as layer:
                turn.answer(run_batches(layer, turn.name, turn.calls, devices)[0])
        states = [result.last_hidden_state for result in forward.results()]
        total = sum(_nll(view, ids, state) for ids, state in zip(batches, states, strict=True))
    mean = total / (windows.numel() - len(windows))
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else math.inf


def _nll(view: ModelView, ids: Tensor, states: Tensor) -> float:
    """Sum of the cross-entropies of one window in nats; ids are (1, length), states (1, length, hidden)."""
    length = ids.shape[1]
    count = max(1, _AT_ONCE // view.config.get_text_config().vocab_size)
    total = 0.0
    for start in range(0, length - 1, count):
        stop = min(start + count, length - 1)
        logits = from_hidden(view.model, ids[:, start:stop], states[:, start:stop])[0].float()
        lost = torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="none")
        total += float(lost.double().sum())
    return total
