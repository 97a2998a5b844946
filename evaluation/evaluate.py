"""Evaluation of a loaded model: token perplexity as the papers measure it, and any task of lm-eval.

Token perplexity: the text is tokenised as one stream and cut into consecutive windows of `length` tokens that do not overlap;
an unfinished last window is dropped; in each window every token but the first is predicted from those before it;
perplexity = exp(sum of negative log likelihoods / predicted tokens). This is the protocol of the GPTQ and SVD-LLM evaluations.
With BOS, each window is BOS and `length` - 1 text tokens, so that the model still sees `length` positions; the published
protocol has BOS at most once, before the first window, which models of the Gemma class do not survive.

Every other task name goes to lm-eval with the same loaded model. Everything that can be wrong with a request (names, texts,
data sets, lengths) is found before the first forward pass.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from ..calibrate.data import same_text
from ..errors import EvaluationError, RequestError
from ..model.likelihood import window_nll
from ..model.precision import float32_products, full_precision
from . import lm_eval as harness
from .activation_rounding import rounded_activations
from .request import Request, check_positions, metric_name, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
"""Called as (task, done, all): windows for perplexity; one unit for a whole lm-eval task."""

# What must be equal for two values of one metric to be comparable.
_SAME_PROTOCOL = ("length", "windows", "bos", "num_fewshot", "limit", "documents", "task_version", "activations")


@dataclass(frozen=True)
class TaskResult:
    """One number and how it was come by.

    Attributes:
        task: the task as asked for (for a group of lm-eval tasks, the group).
        metric: full name, e.g. `wikitext2-token-ppl@2048`, `wikitext-word-ppl`, `gsm8k-exact_match,strict-match@5-shot`.
        value: the number; perplexities are per token, word or byte as the name says.
        stderr: standard error of `value`; for token perplexity by the delta method from the mean negative log likelihoods of
            the windows (tokens of one window are not independent); None if it cannot be told (one window).
        tokens: predicted tokens; None for lm-eval.
        protocol: what was done, JSON-able.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    tokens: int | None
    protocol: dict[str, Any]


@dataclass(frozen=True)
class _Text:
    """A text task that is ready to run: `windows` is (count, length) int64 on the CPU, with BOS where asked for."""

    task: str
    metric: str
    windows: torch.Tensor
    protocol: dict[str, Any]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    calibration_provenance: Sequence[dict] = (),
    allow_calibration_text: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> list[TaskResult]:
    """Evaluate a causal language model on `tasks`, in their order: `measure` of `request.prepare(tasks, **options)`.

    Raises:
        as the two do.
    """
    return measure(
        model,
        tokenizer,
        prepare(tasks, **options),
        calibration_provenance=calibration_provenance,
        allow_calibration_text=allow_calibration_text,
        progress=progress,
    )


@full_precision
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    *,
    calibration_provenance: Sequence[dict] = (),
    allow_calibration_text: bool = False,
    progress: Progress | None = None,
    done: Callable[[TaskResult], None] = lambda result: None,
) -> list[TaskResult]:
    """Carry out a prepared evaluation of a causal language model.

    Args:
        model: where and in whatever dtype it is; its training mode is put back afterwards.
        tokenizer: the model's own; not changed.
        request: what to do; may serve several models.
        calibration_provenance: of the model, to refuse evaluation on the text it was calibrated on.
        allow_calibration_text: evaluate all the same; the protocol says so.
        done: called with every result as soon as it is there.

    Raises:
        RequestError: window longer than the model's positions, text too short, BOS that does not exist, a text that the model
            was calibrated on. Raised before any forward pass.
        EvaluationError: a data set cannot be reached, out of memory, or a value is no number.
        NonFiniteError: a NaN or an infinity in the logits.
    """
    if not allow_calibration_text:
        refuse_calibration_text(request, calibration_provenance)
    others = request.others
    prepend = _prepends_bos(tokenizer, request.bos, others)
    prepared: dict[str, _Text] = {}
    for task in request.texts:
        check_positions(model.config, request.length)
        prepared[task] = _prepare_text(model, tokenizer, task, request, prepend)
        _note_calibration(prepared[task], calibration_provenance)
    loaded = {task: harness.load(request.manager, task, request.num_fewshot) for task in others}

    results: list[TaskResult] = []
    with _evaluation_mode(model), rounded_activations(model, request.activations) as read:
        lm = harness.wrap(model, tokenizer, prepend, request.bos, request.batch_size) if others else None
        for task in request.tasks:
            if task in prepared:
                found = [_token_perplexity(model, prepared[task], request.batch_size, progress)]
            else:
                found = _harness_results(model, lm, task, loaded[task], request, progress)
            for result in found:
                result.protocol.update(read)
                done(result)
            results += found
    return results


def compare(results: Sequence[TaskResult], baseline_results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """Put each metric beside the baseline's: rows of metric, value, baseline, difference (value - baseline), relative.

    `relative` is the difference over the baseline's magnitude, None where the baseline is zero.

    Raises:
        EvaluationError: a metric that the baseline lacks, or that was measured by another protocol.
    """
    baseline = {result.metric: result for result in baseline_results}
    rows = []
    for result in results:
        other = baseline.get(result.metric)
        if other is None:
            raise EvaluationError(
                f"The baseline has no {result.metric}; it has {', '.join(baseline) or 'nothing'}.",
                "Evaluate both on the same tasks with the same options.",
            )
        unequal = [
            f"{key} {mine} against {theirs}"
            for key in _SAME_PROTOCOL
            if (mine := result.protocol.get(key)) != (theirs := other.protocol.get(key))
        ]
        if _hashes(result) != _hashes(other):  # paths may differ
            unequal.append("different texts of one name")
        if result.tokens != other.tokens:
            unequal.append(f"{result.tokens} predicted tokens against {other.tokens}")
        if unequal:
            raise EvaluationError(
                f"{result.metric} was measured in two ways, which cannot be compared: {'; '.join(unequal)}.",
                "Evaluate both with the same options, text and tokenizer.",
            )
        difference = result.value - other.value
        rows.append(
            {
                "metric": result.metric,
                "value": result.value,
                "baseline": other.value,
                "difference": difference,
                "relative": difference / abs(other.value) if other.value else None,
            }
        )
    return rows


def _hashes(result: TaskResult) -> list[str]:
    return [record["sha256"] for record in result.protocol.get("text", ())]


def results_json(
    model_name: str,
    results: Sequence[TaskResult],
    baseline: Sequence[TaskResult] | None = None,
    baseline_name: str | None = None,
) -> dict[str, Any]:
    """What `lrc eval --json` writes: `results` (and `baseline.results`) by full metric name, and `differences`.

    Of what cannot be compared, cut short or measured in two ways, there are no differences.
    """
    named = {result.metric: asdict(result) for result in results}
    document: dict[str, Any] = {"lrc": version("lrc"), "model": model_name, "results": named}
    if baseline is not None:
        document["baseline"] = {"model": baseline_name, "results": {result.metric: asdict(result) for result in baseline}}
        with contextlib.suppress(EvaluationError):
            document["differences"] = compare(results, baseline)
    return document


def _prepends_bos(tokenizer: PreTrainedTokenizerBase, bos: str, others: list[str]) -> bool:
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


def _prepare_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, request: Request, prepend: bool
) -> _Text:
    text, length = request.texts[task], request.length
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
    count = min(available, request.max_windows or available)
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
    return _Text(task, metric_name(task, length), windows, protocol)


def refuse_calibration_text(request: Request, calibration: Sequence[dict], model: str = "the model") -> None:
    """Refuse texts that a model was calibrated on; needs no model.

    Args:
        calibration: provenance of the model's calibration; empty where it has none.
        model: its name, for the error.

    Raises:
        RequestError: one of the request's texts is among them.
    """
    for task, text in request.texts.items():
        if calibration and (same := same_text(tuple(calibration), tuple(text.provenance))):
            raise RequestError(
                f"{task}: {model} was calibrated on the text that it would be evaluated on: {same}.",
                "Such a perplexity is too good. Evaluate on other text, or ask for it with --allow-calibration-text.",
            )


def _note_calibration(text: _Text, calibration: Sequence[dict]) -> None:
    """Put into the protocol whether this is the calibration's text."""
    same = same_text(tuple(calibration), tuple(text.protocol["text"])) if calibration else None
    text.protocol["calibration_text"] = (same or "not the calibration text") if calibration else "calibration unknown or none"


@contextlib.contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"Out of memory during evaluation: {error}", "Give a smaller --batch-size, a smaller --length or another --device."
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def _token_perplexity(model: PreTrainedModel, text: _Text, batch_size: int, progress: Progress | None) -> TaskResult:
    count, length = text.windows.shape
    started = time.perf_counter()
    sums = torch.empty(count, dtype=torch.float64)
    for first in range(0, count, batch_size):
        batch = text.windows[first : first + batch_size]
        sums[first : first + len(batch)] = window_nll(model, batch, text.task, first)
        if progress is not None:
            progress(text.task, first + len(batch), count)
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
    protocol = text.protocol | _circumstances(model, batch_size, seconds) | {"tokens_per_second": tokens / seconds}
    return TaskResult(
        text.task, text.metric, value, None if spread is None else value * spread / math.sqrt(count), tokens, protocol
    )


def _circumstances(model: PreTrainedModel, batch_size: int, seconds: float) -> dict[str, Any]:
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    return {
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": ", ".join(sorted({str(device) for device in placed.values()})),
        "float32_matmul_precision": float32_products(),
        "seed": None,
        "seconds": seconds,
        "versions": {"lrc": version("lrc"), "torch": version("torch"), "transformers": version("transformers")},
    }


def _harness_results(
    model: PreTrainedModel,
    lm: Any,
    task: str,
    loaded: list[Any],
    request: Request,
    progress: Progress | None,
) -> list[TaskResult]:
    if progress is not None:
        progress(task, 0, 1)
    started = time.perf_counter()
    scores = harness.run(lm, task, loaded, request.manager, request.limit, request.num_fewshot)
    circumstances = _circumstances(model, lm.batch_size, time.perf_counter() - started)
    if progress is not None:
        progress(task, 1, 1)
    versions = circumstances.pop("versions")
    results = []
    for score in scores:
        protocol = circumstances | score.protocol
        protocol["versions"] = versions | {"lm_eval": version("lm_eval")}
        results.append(TaskResult(task, score.metric, score.value, score.stderr, None, protocol))
    return results
