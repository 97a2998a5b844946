"""Evaluation of a model: token perplexity (perplexity.py), and any task of lm-eval (lm_eval.py).

Everything that can be wrong with a request (names, texts, data sets, lengths) is found before the first forward pass.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calibrate.data import same_text
from ..checkpoint.folder import RECORD, read_record
from ..checkpoint.hf_quantizer import open_model, require_loadable
from ..checkpoint.location import Location
from ..checkpoint.opening import dtype_of, located
from ..checkpoint.untrusted.files import size_of
from ..errors import EvaluationError, RequestError
from ..model.events import Event, Notify, silent
from ..model.machine.precision import full_precision
from . import lm_eval
from .activation_rounding import rounded_activations
from .perplexity import WindowedText, prepends_bos, token_perplexity, windowed
from .request import LENGTH, Request, Settings, check_positions, prepare
from .results import Evaluation, TaskResult, circumstances

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: str | Path | PreTrainedModel,
    tasks: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Evaluation:
    """Measure a model on some tasks, as `lrc eval` does.

        evaluation = evaluate("OUT", ["wikitext2"], max_windows=16)
        evaluation.metrics["wikitext2-token-ppl@2048"].value

    Args:
        model: a hub id, folder, .gguf file, `pkg:PACKAGE/FILE` or compressed checkpoint; or a causal language model that is
            loaded already (its calibration set is unknown, so evaluation on that text is not refused).
        tasks: one task or several, as in `Settings`.
        tokenizer: of a model that is loaded already; it is not changed.
        device: of a model given by name: cpu, cuda, several with commas between them, or auto.
        dtype: of a model given by name, such as "bfloat16"; None takes the checkpoint's own.
        trust_remote_code: of a model given by name: let code that comes with the checkpoint run.
        settings: the other fields of `Settings`, with its defaults.

    Raises:
        LrcError: as `prepare`, `check_model`, `open_model` and `measure` raise it.
    """
    request = prepare(Settings([tasks] if isinstance(tasks, str) else tasks, **settings))
    if not isinstance(model, (str, Path)):
        if tokenizer is None:
            raise TypeError("a model that is loaded already needs tokenizer=, too")
        return Evaluation(model.name_or_path or type(model).__name__, measure(model, tokenizer, request))
    location, number = located(str(model)), dtype_of(dtype)
    provenance = check_model(request, location, trust_remote_code, number, device)
    loaded, own_tokenizer = open_model(str(model), dtype=number, device=device, trust_remote_code=trust_remote_code)
    return Evaluation(str(model), measure(loaded, own_tokenizer, request, calibration_provenance=provenance))


def check_model(
    request: Request,
    location: Location,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> list[dict]:
    """Refuse a model that cannot be evaluated so; reads no weights, only the headers of their files.

    Returns:
        The provenance of the calibration set that it was compressed with; empty where there is none.

    Raises:
        RequestError: windows longer than the model's positions, or a text that the model was calibrated on.
        CheckpointError: the record of a compressed checkpoint is damaged, or a file of its weights.
        ModelError: a package is missing that reads its quantized weights, or it is not clear which files are the model.
    """
    config = location.config(trust_remote_code)
    if request.texts:
        check_positions(config, request.settings.length)
    provenance: list[dict] = []
    if size_of(location.path / RECORD) is not None:
        provenance = read_record(location.path)["calibration"]["provenance"]
        refuse_calibration_text(request, provenance, location.name)
    require_loadable(location, config, dtype, device)
    return provenance


def longest_window(locations: Sequence[Location], trust_remote_code: bool = False) -> int:
    """The usual length of windows, or fewer tokens where one of the models has fewer positions.

    Raises:
        LrcError: a configuration cannot be read.
    """
    configs = [location.config(trust_remote_code).get_text_config() for location in locations]
    positions = [getattr(config, "max_position_embeddings", None) or LENGTH for config in configs]
    return min([LENGTH, *(each for each in positions if each > 1)])


@full_precision
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    *,
    calibration_provenance: Sequence[dict] = (),
    notify: Notify = silent,
    done: Callable[[TaskResult], None] = lambda result: None,
) -> list[TaskResult]:
    """Carry out a prepared evaluation of a causal language model.

    Args:
        model: where and in whatever dtype it is; its training mode is put back afterwards.
        tokenizer: the model's own; not changed.
        request: what to do; may serve several models.
        calibration_provenance: of the model, to refuse evaluation on the text it was calibrated on.
        notify: is told of every batch of windows, and before and after every lm-eval task.
        done: called with every result as soon as it is there.

    Raises:
        RequestError: window longer than the model's positions, text too short, BOS that does not exist, a text that the model
            was calibrated on. Raised before any forward pass.
        EvaluationError: a data set cannot be reached, out of memory, or a value is no number.
        NonFiniteError: a NaN or an infinity in the logits.
    """
    refuse_calibration_text(request, calibration_provenance)
    settings, others = request.settings, request.others
    prepend = prepends_bos(tokenizer, settings.bos, others)
    texts: dict[str, WindowedText] = {}
    for task in request.texts:
        check_positions(model.config, settings.length)
        texts[task] = windowed(model, tokenizer, task, request, prepend)
        _note_calibration(texts[task], calibration_provenance)
    loaded = {task: lm_eval.load(request.manager, task, settings.num_fewshot) for task in others}

    results: list[TaskResult] = []
    with _evaluation_mode(model), rounded_activations(model, settings.activations) as read:
        lm = lm_eval.wrap(model, tokenizer, prepend, settings.bos, settings.batch_size) if others else None
        for task in settings.tasks:
            if task in texts:
                found = [token_perplexity(model, texts[task], settings.batch_size, notify)]
            else:
                found = _lm_eval_results(lm, task, loaded[task], request, notify)
            for result in found:
                result.protocol.update(read)
                done(result)
            results += found
    return results


def refuse_calibration_text(request: Request, calibration: Sequence[dict], model: str = "the model") -> None:
    """Refuse texts that a model was calibrated on, unless the request allows them; needs no model.

    Args:
        calibration: provenance of the model's calibration set; empty where it has none.
        model: its name, for the error.

    Raises:
        RequestError: one of the request's texts is among them.
    """
    if request.settings.allow_calibration_text:
        return
    for task, text in request.texts.items():
        if calibration and (same := same_text(tuple(calibration), tuple(text.provenance))):
            raise RequestError(
                f"{task}: {model} was calibrated on the text that it would be evaluated on: {same}.",
                "Such a perplexity is too good. Evaluate on other text, or ask for it with --allow-calibration-text.",
            )


def _note_calibration(text: WindowedText, calibration: Sequence[dict]) -> None:
    """Put into the protocol whether this is text of the calibration set."""
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


def _lm_eval_results(lm: Any, task: str, loaded: list[Any], request: Request, notify: Notify) -> list[TaskResult]:
    notify(Event(task, 0, 1))
    started = time.perf_counter()
    scores = lm_eval.run(lm, task, loaded, request.manager, request.settings.limit, request.settings.num_fewshot)
    measured_by = circumstances(lm.model, lm.batch_size, time.perf_counter() - started)
    notify(Event(task, 1, 1))
    versions = measured_by.pop("versions")
    results = []
    for score in scores:
        protocol = measured_by | score.protocol
        protocol["versions"] = versions | {"lm_eval": version("lm_eval")}
        results.append(TaskResult(task, score.metric, score.value, score.stderr, None, protocol))
    return results
