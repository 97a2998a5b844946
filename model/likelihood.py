"""Log likelihood of token windows under a causal language model, in bounded memory."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from ..checkpoint.architecture import text_decoder
from ..checkpoint.untrusted.foreign import foreign
from ..errors import EvaluationError, NonFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits computed at a time: 2048 tokens over 256k words would be 2 GiB in float32. In 16 bits this many are 24 MiB, which glibc
# keeps for the next ones; it would return 32 MiB to the system. With fewer, repacking the head's weight takes more of the time.
_LOGITS_AT_ONCE = 3 * 2**22
_IN_CACHE = 2**20  # logits that are summed at a time: they fit in a processor's cache, which takes half the time


def window_nll(model: PreTrainedModel, windows: torch.Tensor, task: str, first: int) -> torch.Tensor:
    """Negative log likelihood of each window: the sum over its tokens but the first, each predicted from those before it.

    Args:
        model: a causal language model in evaluation mode.
        windows: (batch, length) int64 token ids, on any device.
        task: name of the text that the windows are from, for the error.
        first: the number of the first window in the task, from 0, for the error.

    Returns:
        (batch,) float64 on the CPU, in nats; logits are widened to float32 and their losses summed in float64.

    Raises:
        NonFiniteError: a NaN or an infinity in the logits.
    """
    batch, length = windows.shape
    ids = windows.to(_input_device(model))
    at_once = max(1, _LOGITS_AT_ONCE // (batch * model.config.get_text_config().vocab_size))
    total = torch.zeros(batch, dtype=torch.float64)
    with _logits(model, ids) as logits_of:
        for start in range(0, length - 1, at_once):
            stop = min(start + at_once, length - 1)
            logits = logits_of(start, stop)
            # aminmax returns NaN where there is one, and unlike isfinite needs no second tensor of this size.
            if not all(extreme.isfinite() for extreme in torch.aminmax(logits)):
                row, position = (~logits.isfinite().all(dim=-1)).nonzero()[0].tolist()
                raise NonFiniteError(
                    f"{task}: the logits after token {start + position + 1} of window {first + row + 1} are not finite "
                    f"({str(logits.dtype).removeprefix('torch.')}).",
                    "Try another --dtype (float16 overflows first); if that does not help, the weights are broken "
                    "(lrc verify checks those of a compressed checkpoint).",
                )
            total += _summed(logits, ids[:, start + 1 : stop + 1].to(logits.device))
    return total


def _summed(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log likelihoods of (batch, tokens) targets under (batch, tokens, words) logits, summed: (batch,) float64."""
    rows = _IN_CACHE // logits.shape[-1] if logits.device.type == "cpu" else logits.shape[0] * logits.shape[1]
    parts = zip(logits.flatten(0, 1).split(max(1, rows)), targets.flatten().split(max(1, rows)), strict=True)
    nll = torch.cat([cross_entropy(words.float(), right, reduction="none") for words, right in parts])
    return nll.view(len(logits), -1).double().sum(dim=1).cpu()


def makes_few_logits(model: Any) -> bool:
    """Whether a model's forward can be told (`logits_to_keep`) for which positions to compute logits."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[Callable[[int, int], torch.Tensor]]:
    """Give a function of (start, stop) that returns the model's own logits at these positions: (batch, stop - start, words).

    The decoder runs once. Then the model's forward, its decoder replaced by that output, computes the logits of a few
    positions at a time. So a model's own processing of logits (soft-capping, scaling) is applied, and they are never all in
    memory. A model that does not take `logits_to_keep` computes them all at once, in its own dtype.
    """
    decoder = text_decoder(model)
    outputs: list[Any] = []
    if decoder is not model and makes_few_logits(model):
        hook = decoder.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            _answer(model, input_ids=ids, logits_to_keep=1)
        finally:
            hook.remove()
    if len(outputs) != 1:
        whole = _answer(model, input_ids=ids)
        yield lambda start, stop: whole[:, start:stop]
        return
    own = vars(decoder).get("forward")  # set where accelerate has put a model on several devices

    def replayed(start: int, stop: int) -> torch.Tensor:
        positions = torch.arange(start, stop, device=ids.device)
        return _answer(model, input_ids=ids, logits_to_keep=positions)

    decoder.forward = lambda *_inputs, **_options: outputs[0]
    try:
        yield replayed
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


def _answer(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """The model's logits. Its forward follows its config.json, which may say anything that the shapes of the weights allow."""
    remedy = "A setting in its config.json is damaged, or its weights are (lrc verify checks those of a compressed checkpoint)."
    with foreign(EvaluationError, "The model cannot be run", remedy):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


def _input_device(model: Any) -> torch.device:
    # Offloaded weights are on "meta" between calls; accelerate then moves the inputs itself.
    device = next(model.get_input_embeddings().parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
