"""The results of an evaluation: values with their protocol, compared with those of a baseline, and as JSON."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..errors import EvaluationError
from ..model.machine.precision import float32_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Two values of one metric can be compared only where these are equal.
_SAME_PROTOCOL = ("length", "windows", "bos", "num_fewshot", "limit", "documents", "task_version", "activations")


@dataclass(frozen=True)
class TaskResult:
    """The value of one metric, and how it was measured.

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
class Evaluation:
    """What was measured of one model.

    Attributes:
        model: its name.
        results: one for each metric, in the order of the tasks.
    """

    model: str
    results: list[TaskResult] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, TaskResult]:
        """Full name of a metric, e.g. `wikitext2-token-ppl@2048` -> its value, standard error, tokens and protocol."""
        return {result.metric: result for result in self.results}


def compare(evaluation: Evaluation, baseline: Evaluation) -> list[dict[str, Any]]:
    """Put each metric beside the baseline's: rows of metric, value, baseline, difference (value - baseline), relative.

    `relative` is the difference over the baseline's magnitude, None where the baseline is zero.

    Raises:
        EvaluationError: a metric that the baseline lacks, or that was measured by another protocol.
    """
    others = baseline.metrics
    rows = []
    for result in evaluation.results:
        other = others.get(result.metric)
        if other is None:
            raise EvaluationError(
                f"The baseline has no {result.metric}; it has {', '.join(others) or 'nothing'}.",
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
                f"{result.metric} was measured by two protocols, which cannot be compared: {'; '.join(unequal)}.",
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


def results_json(evaluation: Evaluation, baseline: Evaluation | None = None) -> dict[str, Any]:
    """What `lrc eval --json` writes: `results` (and `baseline.results`) by full metric name, and `differences`.

    There are no differences where the two cannot be compared: one was cut short, or their protocols differ.
    """
    document: dict[str, Any] = {"lrc": version("lrc"), "model": evaluation.model, "results": _by_name(evaluation)}
    if baseline is not None:
        document["baseline"] = {"model": baseline.model, "results": _by_name(baseline)}
        with contextlib.suppress(EvaluationError):
            document["differences"] = compare(evaluation, baseline)
    return document


def _by_name(evaluation: Evaluation) -> dict[str, Any]:
    return {name: asdict(result) for name, result in evaluation.metrics.items()}


def circumstances(model: PreTrainedModel, batch_size: int, seconds: float) -> dict[str, Any]:
    """The part of a protocol that says what computed a value: batch size, dtype, device, seconds, versions."""
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
