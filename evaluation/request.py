"""The request for an evaluation, checked before any model is loaded.

Loading a large model takes minutes: a mistyped task, a missing file or an option without effect is found before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibrate.data import EvaluationText, evaluation_text
from ..calibrate.sources import TOPICS
from ..errors import CalibrationError, RequestError, did_you_mean
from ..model.view import require_positions
from . import lm_eval
from .activation_rounding import ROUNDINGS

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedConfig

PERPLEXITY_TASKS = ("wikitext2", "ptb", "c4", TOPICS)
QUICK_WINDOWS = 16  # of each text, where a person names no tasks
LENGTH = 2048
PERPLEXITY_SCHEMES = ("text:", "jsonl:", "parquet:", "hf:")
BOS_CHOICES = ("auto", "always", "never")


@dataclass(frozen=True)
class Settings:
    """What is measured, and how; the defaults are those of `lrc eval`.

    Attributes:
        tasks: `wikitext2`, `ptb`, `c4`, `pydoc-topics`, `text:PATH`, `jsonl:PATH[:FIELD]`, `parquet:PATH[:COLUMN]`,
            `hf:NAME[:…]` for token perplexity; any other name is a task, group, tag or YAML file of lm-eval.
        length: tokens per window, BOS included.
        bos: `auto` prepends BOS to every window if the tokenizer itself puts it before texts; `always`; `never`.
        max_windows: use only the first so many windows of each text.
        limit: lm-eval only: the first so many documents of each task (below 1: that fraction).
        num_fewshot: lm-eval only: examples in the prompt; None is the task's own default.
        batch_size: windows, or lm-eval requests, per forward pass; changes no result beyond rounding.
        include_path: lm-eval only: a folder with task files of one's own.
        activations: `int8` or `mxint8`: the inputs of the layers' matrices are rounded so; None: they are not
            (evaluation/activation_rounding.py).
        allow_calibration_text: evaluate even on the text of the model's calibration set; the protocol says so.
    """

    tasks: Sequence[str]
    length: int = LENGTH
    bos: str = "auto"
    max_windows: int | None = None
    limit: int | float | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    include_path: str | Path | None = None
    activations: str | None = None
    allow_calibration_text: bool = False


@dataclass(frozen=True)
class Request:
    """Settings that were checked, with their texts read; made by `prepare`.

    Attributes:
        texts: task -> its text, for the tasks that are lrc's own token perplexities.
        manager: lm-eval's index of tasks; None where every task is lrc's own.
    """

    settings: Settings
    texts: Mapping[str, EvaluationText]
    manager: TaskManager | None

    @property
    def others(self) -> list[str]:
        """The tasks that are lm-eval's, in their order."""
        return [task for task in self.settings.tasks if task not in self.texts]


def prepare(settings: Settings, texts: Mapping[str, EvaluationText] | None = None) -> Request:
    """Check a request and read its texts.

    Args:
        texts: task -> its text, where that was read before.

    Raises:
        RequestError: unknown task, wrong or useless option, two tasks that would be reported by one name.
        CalibrationError: a text cannot be had.
    """
    _check_options(settings)
    own = [task for task in settings.tasks if is_perplexity_task(task)]
    others = [task for task in settings.tasks if not is_perplexity_task(task)]
    _check_useless_options(settings, own, others)
    manager = lm_eval.open_tasks(others, settings.include_path, known=PERPLEXITY_TASKS) if others else None
    _check_distinct(own, settings.length)
    read = texts or {}
    return Request(settings, {task: read.get(task) or evaluation_text(task) for task in own}, manager)


def usual_texts() -> tuple[dict[str, EvaluationText], str]:
    """The texts to measure on where a person names no task, and a sentence about them.

    One is on every machine; WikiText-2 is the other, where the hub or its cache gives it.
    """
    texts = {TOPICS: evaluation_text(TOPICS)}
    try:
        texts["wikitext2"] = evaluation_text("wikitext2")
    except CalibrationError as error:
        return texts, f"the language reference that comes with Python ({TOPICS}); wikitext2 is left out: {error.what}"
    return texts, f"the language reference that comes with Python ({TOPICS}), and wikitext2"


def is_perplexity_task(task: str) -> bool:
    """Whether `task` is one of lrc's own token perplexities; if not, it is lm-eval's."""
    return task in PERPLEXITY_TASKS or task.startswith(PERPLEXITY_SCHEMES)


def metric_name(task: str, length: int) -> str:
    """A token perplexity's full name; a file by its base name, so that the name does not depend on its folder."""
    scheme, _, rest = task.partition(":")
    readable = f"{scheme}:{rest.rsplit('/', 1)[-1]}" if scheme in ("text", "jsonl", "parquet") else task
    return f"{readable}-token-ppl@{length}"


def check_positions(config: PreTrainedConfig, length: int, flag: str = "--length") -> None:
    """Refuse windows that are longer than the model's positions; `flag` is the option for their length."""
    require_positions(config, length, flag)


def _check_options(settings: Settings) -> None:
    tasks, length = settings.tasks, settings.length
    if isinstance(tasks, str):
        raise TypeError(f"tasks is a sequence of names, not the string {tasks!r}")
    if not tasks:
        raise RequestError("No task to evaluate.", f"Give --tasks, for instance {PERPLEXITY_TASKS[0]} or text:PATH.")
    twice = sorted({task for task in tasks if list(tasks).count(task) > 1})
    if twice:
        raise RequestError(f"Asked for more than once: {', '.join(twice)}.", "Name each task once.")
    if settings.bos not in BOS_CHOICES:
        raise RequestError(f"--bos {settings.bos} is not a choice.", f"Choices: {', '.join(BOS_CHOICES)}.")
    if length < 2:
        raise RequestError(f"--length {length}: a window needs 2 tokens at least, one of them to predict.", "Papers use 2048.")
    if settings.batch_size < 1:
        raise RequestError(f"--batch-size {settings.batch_size} is not a positive number.", "1 needs the least memory.")
    activations = settings.activations
    if activations is not None and activations not in ROUNDINGS:
        raise RequestError(f"--activations {activations} is not a choice.", did_you_mean(activations, ROUNDINGS))


def _check_useless_options(settings: Settings, texts: list[str], others: list[str]) -> None:
    """Refuse an option without effect: a run that was meant to be short would take hours."""
    max_windows, limit, num_fewshot = settings.max_windows, settings.limit, settings.num_fewshot
    if max_windows is not None and max_windows < 1:
        raise RequestError(f"--max-windows {max_windows} is not a positive number.", "Leave it out for the whole text.")
    if limit is not None and limit <= 0:
        raise RequestError(f"--limit {limit} is not a positive number.", "Leave it out for all documents.")
    if num_fewshot is not None and num_fewshot < 0:
        raise RequestError(f"--num-fewshot {num_fewshot} is negative.", "Leave it out for each task's own default.")
    if max_windows is not None and not texts:
        raise RequestError(
            f"--max-windows {max_windows} is for texts, and every task here is lm-eval's: {', '.join(others)}.",
            "To run fewer documents of an lm-eval task, give --limit.",
        )
    given = {"--limit": limit, "--num-fewshot": num_fewshot, "--include-path": settings.include_path}
    useless = [f"{flag} {value}" for flag, value in given.items() if value is not None]
    if useless and not others:
        raise RequestError(
            f"{', '.join(useless)}: only for lm-eval tasks, and none is asked for ({', '.join(texts)}).",
            "To run less of a text, give --max-windows.",
        )


def _check_distinct(tasks: Sequence[str], length: int) -> None:
    named: dict[str, str] = {}
    for task in tasks:
        name = metric_name(task, length)
        if name in named:
            raise RequestError(
                f"{named[name]} and {task} would both be reported as {name}.",
                "Rename one of the files, or evaluate them in two commands.",
            )
        named[name] = task
