"""lm-eval's tasks on a model that is already loaded.

lm-eval is imported when it is needed: indexing its tasks takes seconds.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import yaml

from ..errors import EvaluationError, NonFiniteError, RequestError

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_READABLE_METRICS = {
    "word_perplexity": "word-ppl",
    "byte_perplexity": "byte-ppl",
    "perplexity": "ppl",
    "bits_per_byte": "bits-per-byte",
}
_NOT_METRICS = ("name", "alias", "sample_len", "sample_count")


@dataclass(frozen=True)
class Score:
    """One metric of one lm-eval task (or of one member of a group): full name, value, standard error if there is one."""

    metric: str
    value: float
    stderr: float | None
    protocol: dict[str, Any]


def open_tasks(names: Sequence[str], include_path: str | Path | None, known: Iterable[str] = ()) -> TaskManager:
    """Index lm-eval's task files, and those under `include_path`, and check `names` against them.

    Args:
        names: tasks, groups, tags, or paths of task files.
        include_path: a folder with task files of one's own.
        known: further names to suggest for a mistyped one.

    Raises:
        RequestError: `include_path` is no folder, or a name is unknown.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise RequestError(f"--include-path {include_path} is not a folder.", "Give the folder of your task files (.yaml).")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    indexed = set(manager.all_tasks)
    for name in names:
        if name in indexed or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            continue
        close = difflib.get_close_matches(name, sorted(indexed | set(known)), n=3)
        if Path(name).is_file():
            remedy = f"For the perplexity of a text file, give text:{name}."
        elif close:
            remedy = "Did you mean " + " or ".join(f"'{match}'" for match in close) + "?"
        else:
            remedy = (
                f"Known: {', '.join(known)}, text:PATH, jsonl:PATH, parquet:PATH, hf:NAME, and {len(indexed)} tasks of lm-eval "
                "(lm-eval ls tasks lists them; --include-path adds your own: a file that is not valid is not listed)."
            )
        raise RequestError(f"No task is called '{name}'.", remedy)
    return manager


def load(manager: TaskManager, name: str, num_fewshot: int | None) -> list[Task | Group]:
    """Load one task, group or tag with its data.

    Raises:
        EvaluationError: its data set cannot be reached, or a package that it needs is missing.
        RequestError: it is badly defined, runs generated code, needs images, or forbids `num_fewshot`.
    """
    try:
        loaded = manager.load([name])
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise EvaluationError(
            f"{name}: its data set cannot be had: {_first_line(error)}",
            "Fetch it once with a connection (it is then cached), or point a task file of your own at local data "
            "(dataset_path: json, dataset_kwargs: data_files) and give its folder with --include-path.",
        ) from error
    except ImportError as error:
        raise EvaluationError(f"{name}: it needs a package that is missing: {_first_line(error)}", "Install it.") from error
    except (ValueError, KeyError, AssertionError, yaml.YAMLError) as error:
        raise RequestError(f"{name}: lm-eval cannot set this up: {_first_line(error)}", "Check the task's file.") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise RequestError(f"{name} runs code that the model writes; lrc does not.", "Run it with lm-eval in a sandbox.")
        if getattr(task, "MULTIMODAL", False):
            raise RequestError(f"{name} needs images or sound; lrc evaluates text.", "Leave it out.")
        if num_fewshot and task.get_config("num_fewshot") == 0:
            raise RequestError(
                f"--num-fewshot {num_fewshot}: {task.task_name} is defined with 0 examples, and lm-eval keeps to that.",
                "Evaluate it in a command without --num-fewshot.",
            )
        if num_fewshot and task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise RequestError(
                f"--num-fewshot {num_fewshot}: {task.task_name} is the likelihood of a whole text, which takes no examples.",
                "Evaluate it in a command without --num-fewshot.",
            )
    groups = loaded["groups"]
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prepend: bool, bos: str, batch_size: int) -> HFLM:
    """The model in the form that lm-eval needs. The tokenizer is copied, because lm-eval sets a padding token.

    With `bos` "auto" the tokenizer decides about BOS; otherwise it is put before every request or before none (`prepend`).
    """
    from lm_eval.models.huggingface import HFLM

    # It warns that arguments are ignored when it is given a loaded model; none of those are passed.
    with _quiet(logging.getLogger("lm_eval.models.huggingface")):
        return HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            add_bos_token=None if bos == "auto" else prepend,
        )


def run(
    lm: HFLM, name: str, loaded: list[Task | Group], manager: TaskManager, limit: int | float | None, num_fewshot: int | None
) -> list[Score]:
    """Run what `load` gave and return every metric of it.

    Raises:
        NonFiniteError: the model gave a NaN or an infinity.
        EvaluationError: a metric is not a finite number.
    """
    import lm_eval

    with _finite_logits(lm.model, name):
        answer = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(loaded),
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=lm.batch_size,
            task_manager=manager,
            log_samples=False,
        )
    scores = []
    for member, metrics in answer["results"].items():
        for key, value in metrics.items():
            metric, _, variant = key.partition(",")
            if key.strip() in ("", *_NOT_METRICS) or metric.endswith("_stderr"):
                continue
            shots = answer["n-shot"].get(member)
            title = _readable(member, metric, variant, shots)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise EvaluationError(f"{title} is {value!r}, not a finite number.", "Leave it out, or give a larger --limit.")
            stderr = metrics.get(f"{metric}_stderr,{variant}")
            usable = isinstance(stderr, (int, float)) and math.isfinite(stderr)
            protocol = _protocol(answer, lm, member, metric, limit)
            scores.append(Score(title, float(value), float(stderr) if usable else None, protocol))
    if not scores:
        raise EvaluationError(f"{name}: lm-eval gave no metric.", "A group without an aggregate has none: name its tasks.")
    return scores


def _readable(member: str, metric: str, variant: str, shots: int | None) -> str:
    title = f"{member}-{_READABLE_METRICS.get(metric, metric)}"
    if variant and variant != "none":
        title += f",{variant}"
    return f"{title}@{shots}-shot" if shots else title


def _protocol(answer: dict[str, Any], lm: HFLM, member: str, metric: str, limit: int | float | None) -> dict[str, Any]:
    settings = answer["config"]
    return {
        "num_fewshot": answer["n-shot"].get(member),
        "limit": limit,
        "documents": answer["n-samples"].get(member, {}).get("effective"),
        "task_version": answer["versions"].get(member),
        "higher_is_better": answer["higher_is_better"].get(member, {}).get(metric),
        "bos": {None: "as the tokenizer does", True: "before each request", False: "none"}[lm.add_bos_token],
        "max_length": lm.max_length,
        "seed": {key: settings[f"{key}_seed"] for key in ("random", "numpy", "torch", "fewshot")},
    }


@contextlib.contextmanager
def _finite_logits(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Check all logits while lm-eval runs: it would count a NaN as a wrong answer."""

    def check(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if not all(extreme.isfinite() for extreme in torch.aminmax(output.logits)):
            raise NonFiniteError(
                f"{name}: logits that are not finite ({str(output.logits.dtype).removeprefix('torch.')}).",
                "Try another --dtype (float16 overflows first); if that does not help, the weights are broken "
                "(lrc verify checks those of a compressed checkpoint).",
            )

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
