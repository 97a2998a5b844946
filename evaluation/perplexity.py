"""Token perplexity as the papers measure it.

The text is tokenised as one stream and cut into consecutive windows of `length` tokens that do not overlap; an unfinished last
window is dropped; in each window every token but the first is predicted from those before it; perplexity = exp(sum of negative
log likelihoods / predicted tokens). This is the protocol of the GPTQ and SVD-LLM evaluations. With BOS, each window is BOS and
`length` - 1 text tokens, so that the model still sees `length` positions; the published protocol has BOS at most once, before
the first window, which models of the Gemma class do not survive.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EvaluationError, RequestError
from ..model.events import Event, Notify
from ..model.likelihood import window_nll
from .request import Request, metric_name
from .results import TaskResult, circumstances

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class WindowedText:
    """A text task that is ready to run: `windows` is (count, length) int64 on the CPU, with BOS where asked for."""

    task: str
    metric: str
    windows: torch.Tensor
    protocol: dict[str, Any]


def prepends_bos(tokenizer: PreTrainedTokenizerBase, bos: str, others: list[str]) -> bool:
    """Whether windows begin with BOS; what the tokenizer does is found out by asking it."""
    start = tokenizer.bos_token_id
    by_itself = start is not None and tokenizer("a")["input_ids"][:1] == [start]
    if bos == "always" and start is None:
        raise RequestError("--bos always: this tokenizer has no BOS token.", "Use --bos auto or --bos never.")
    if bos == "always" and others and not by_itself:
        raise RequestError(
            f"--bos always: lm-eval leaves BOS to the tokenizer, and this one adds none ({', '.join(others)}).",
            "Evaluate texts and lm-eval tasks in two commands, the latter with --bos auto.",
        )
    return bos == "always" or (bos == "auto" and by_itself)


def windowed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, request: Request, prepend: bool
) -> WindowedText:
    """A text of the request as windows of token ids; `prepend`: each begins with BOS, which counts among its tokens.

    Raises:
        RequestError: the text is shorter than one window, or holds a token that the model does not know.
    """
    text, length = request.texts[task], request.settings.length
    stream = torch.tensor(tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    step = length - prepend
    available = len(stream) // step
    if not available:
        raise RequestError(
            f"{task} has {len(stream)} tokens, fewer than the {step} of one window of --length {length}.",
            f"Give --length {len(stream) + prepend} or less, or a longer text." if len(stream) > 1 else "Give a longer text.",
        )
    vocabulary = model.config.get_text_config().vocab_size
    if (largest := int(stream.max())) >= vocabulary:
        raise RequestError(
            f"{task}: the tokenizer gives token {largest}, and the model knows tokens 0 to {vocabulary - 1}.",
            "Tokenizer and model do not belong together; give the model with its own tokenizer.",
        )
    count = min(available, request.settings.max_windows or available)
    windows = stream[: count * step].view(count, step)
    if prepend:
        windows = torch.cat([torch.full((count, 1), tokenizer.bos_token_id), windows], dim=1)
    protocol = {
        "windows": count,
        "windows_available": available,
        "length": length,
        "stride": step,
        "bos": "prepended to each window" if prepend else "none",
        "stream_tokens": len(stream),
        "unused_tail_tokens": len(stream) - available * step,
        "text": [dict(record) for record in text.provenance],
        "text_put_together": text.protocol,
        "higher_is_better": False,
    }
    return WindowedText(task, metric_name(task, length), windows, protocol)


def token_perplexity(model: PreTrainedModel, text: WindowedText, batch_size: int, notify: Notify) -> TaskResult:
    """The token perplexity of a model, loaded whole, over the windows of a text; `notify` is told of every batch.

    Raises:
        EvaluationError: a logit is not finite, or the perplexity is no finite number.
    """
    count, length = text.windows.shape
    started = time.perf_counter()
    sums = torch.empty(count, dtype=torch.float64)
    for first in range(0, count, batch_size):
        batch = text.windows[first : first + batch_size]
        sums[first : first + len(batch)] = window_nll(model, batch, text.task, first)
        notify(Event(text.task, first + len(batch), count))
    seconds = time.perf_counter() - started
    tokens = count * (length - 1)
    nll = sums.sum().item() / tokens
    if nll > math.log(torch.finfo(torch.float64).max):
        raise EvaluationError(
            f"{text.metric}: {nll:.6g} nats per token on average; its exponential is no finite number.",
            "The model is broken. A result of lrc's is checked by lrc verify.",
        )
    value = math.exp(nll)
    # Per token, so that the windows' spread is that of the quantity whose exponential is reported.
    spread = (sums / (length - 1)).std(correction=1).item() if count > 1 else None
    protocol = text.protocol | circumstances(model, batch_size, seconds) | {"tokens_per_second": tokens / seconds}
    return TaskResult(
        text.task, text.metric, value, None if spread is None else value * spread / math.sqrt(count), tokens, protocol
    )
