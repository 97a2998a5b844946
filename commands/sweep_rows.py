"""A sweep: many recipes on one model, one table.

Each row is what a person would type, `lrc compress` and then `lrc eval`, in processes of their own (row_process.py), so that
seconds and peak memory are a row's own. Recipes that start from the original model share its statistics, collected once.
Finished rows are in `sweep.json`; the same command continues with what is missing. One process works in a sweep's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import clear_leftovers, discard, locked, read_json, write_json, write_text, writing
from ..errors import BudgetError, RequestError, SweepError
from ..model.view import ModelView
from ..plan.plan import Draft
from ..plan.planner import make_draft
from ..plan.recipe import Recipe
from . import row_process

TABLE = "sweep.json"
_LOCK = ".lrc.lock"
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Sweep:
    """What all rows have in common.

    Args:
        model: as `lrc compress` takes it.
        folder: for `sweep.json`, statistics and logs; created if need be.
        compress: further arguments of `lrc compress`, the same for every row.
        evaluate: further arguments of `lrc eval`.
        parallel: rows at a time, each with its share of the cores.
        keep: leave the compressed checkpoints in the folder.
        read: sha256 of the model's files and of the texts, by what they are.
    """

    model: str
    folder: Path
    compress: Sequence[str] = ()
    evaluate: Sequence[str] = ()
    parallel: int = 1
    keep: bool = False
    read: Mapping[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> dict[str, Any]:
        """What decides the numbers of a row, as it is written to `sweep.json`."""
        return {"model": self.model, "compress": list(self.compress), "evaluate": list(self.evaluate), **self.read}


@dataclass(frozen=True)
class Job:
    """A row to be made: a recipe at a ratio (None where the recipe fixes the size); without a recipe, the original model.

    Args:
        settings: the resolved recipe without its calibration; a row with other settings is made anew.
        nbytes: of the original model's tensors, for the row without a recipe.
    """

    recipe: str | None
    ratio: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    nbytes: int = 0

    @property
    def name(self) -> str:
        """The name of the row and its files, such as 'svd-llm-0.2'."""
        if self.recipe is None:
            return "original"
        path = Path(self.recipe)  # shipped ones have names without a folder
        stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
        return stem if self.ratio is None else f"{stem}-{self.ratio:g}"


@dataclass(frozen=True)
class Row:
    """One finished row.

    Args:
        metrics: full metric name -> value.
        nbytes: of the model's tensors on disk.
        removed: fraction of the targets' bytes removed.
        seconds: of compressing, without the statistics that rows share.
        peak_bytes: resident memory of compressing.
        settings: as in `Job`.
        speeds: metric -> tokens/s while it was measured.
    """

    name: str
    metrics: dict[str, float]
    nbytes: int
    removed: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    commands: list[list[str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Table:
    """The contents of `sweep.json`: what the sweep was asked for, and its finished rows."""

    asked: dict[str, Any]
    rows: list[Row]


def planned_jobs(view: ModelView, recipes: Mapping[str, Recipe], ratios: Sequence[float]) -> tuple[list[Job], list[Draft]]:
    """The rows of a sweep and their plans; a recipe that does not fix the size itself gets one row for each ratio."""
    jobs, plans = [], []
    for name, recipe in recipes.items():
        try:
            plans.append(make_draft(view, recipe))
            jobs.append(_job(name, recipe, recipe.ratio))
        except BudgetError:
            if any(each is not None for each in recipe.amounts.values()):
                raise  # the recipe fixes the size, and it cannot be met
            for ratio in ratios:
                plans.append(make_draft(view, recipe.model_copy(update={"ratio": ratio})))
                jobs.append(_job(name, recipe, ratio))
    _require_names(jobs)
    return jobs, plans


def _job(name: str, recipe: Recipe, ratio: float | None) -> Job:
    return Job(name, ratio, {key: value for key, value in recipe.resolved().items() if key not in ("calibration", "ratio")})


def _require_names(jobs: Sequence[Job]) -> None:
    """Refuse two rows of one name: the table would hold only one of them."""
    named: dict[str, Job] = {Job(None).name: Job(None)}
    for job in jobs:
        if (other := named.setdefault(job.name, job)) is not job:
            what = " and ".join(f"{each.recipe or 'the model as it is'}" for each in (other, job))
            raise RequestError(
                f"Two rows would be called {job.name}: {what}.",
                "Name every recipe and every ratio once (six digits count), and give recipe files different names.",
            )


def run_sweep(sweep: Sweep, jobs: Sequence[Job], notify: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Carry out what is missing of a sweep and return all rows in the order of `jobs`.

    Args:
        notify: called with every row that is finished.

    Raises:
        RequestError: the folder holds another sweep, or another process works in it.
        SweepError: rows failed; names them with the last lines of their logs. Finished rows stay.
        OutputError: the folder cannot be written.
    """
    lock = sweep.folder / _LOCK
    with writing(sweep.folder):
        sweep.folder.mkdir(parents=True, exist_ok=True)
        held = locked(lock)
    try:
        with writing(sweep.folder):
            clear_leftovers(sweep.folder)
        return _all_rows(sweep, jobs, notify)
    finally:
        lock.unlink(missing_ok=True)
        held.close()


def _all_rows(sweep: Sweep, jobs: Sequence[Job], notify: Callable[[Row], None]) -> list[Row]:
    rows = finished_rows(sweep)
    failures: dict[str, str] = {}
    finished = threading.Lock()

    def one(job: Job) -> None:
        """Make a row unless it is finished with the same settings; note a failure."""
        out = sweep.folder / job.name
        if job.name in rows:
            if rows[job.name].settings == job.settings:
                return
            with writing(out):
                discard(out)  # a checkpoint that was kept
        try:
            row = _row(sweep, job)
        except SweepError as error:
            failures.update(error.failures)
            return
        if not sweep.keep:
            with writing(out):
                discard(out)
        with finished:  # rows may end at the same time
            rows[job.name] = row
            write_json(sweep.folder / TABLE, _Table(sweep.asked, list(rows.values())), indent=2)
            notify(row)

    # every recipe's first ratio before any second one: rows of one recipe beside each other would both measure its losses
    turns = sorted(range(len(jobs)), key=lambda place: sum(job.recipe == jobs[place].recipe for job in jobs[:place]))
    with _share_of_cores(sweep.parallel), ThreadPoolExecutor(sweep.parallel) as pool:
        list(pool.map(one, (jobs[place] for place in turns)))
    if failures:
        raise SweepError(failures)
    return [rows[job.name] for job in jobs]


def _row(sweep: Sweep, job: Job) -> Row:
    out, log, scores = (sweep.folder / f"{job.name}{suffix}" for suffix in ("", ".log", ".json"))
    evaluate = ["lrc", "eval", sweep.model if job.recipe is None else str(out), "--json", str(scores), *sweep.evaluate]
    if job.recipe is None:
        row_process.run(evaluate[1:], log)
        return Row(
            job.name, _metrics(scores), job.nbytes, commands=[evaluate], settings=dict(job.settings), speeds=_speeds(scores)
        )
    ratio = [] if job.ratio is None else ["--ratio", f"{job.ratio:g}"]
    compress = [
        "lrc",
        "compress",
        sweep.model,
        "--recipe",
        job.recipe,
        *ratio,
        "--out",
        str(out),
        "--no-check",
        "--no-time",
        *sweep.compress,
    ]
    seconds, peak = row_process.run(compress[1:], log)
    row_process.run(evaluate[1:], log)
    record = (out / "lrc.json").read_text()
    write_text(sweep.folder / f"{job.name}.lrc.json", record)
    held = json.loads(record)
    return Row(
        job.name, _metrics(scores), held["bytes"]["model_after"], held["ratio"], seconds, peak,
        commands=[compress, evaluate], settings=dict(job.settings), speeds=_speeds(scores),
    )  # fmt: skip


def _metrics(scores: Path) -> dict[str, float]:
    return {name: result["value"] for name, result in json.loads(scores.read_text())["results"].items()}


def _speeds(scores: Path) -> dict[str, float]:
    results = json.loads(scores.read_text())["results"].items()
    speeds = {metric: result["protocol"].get("tokens_per_second") for metric, result in results}
    return {metric: speed for metric, speed in speeds.items() if speed}


@contextlib.contextmanager
def _share_of_cores(parallel: int) -> Iterator[None]:
    """Processes that are started meanwhile take their share of the cores, where several run at a time."""
    before = os.environ.get(_THREADS)
    if parallel > 1:
        os.environ[_THREADS] = str(max(1, (os.cpu_count() or 1) // parallel))
    try:
        yield
    finally:
        os.environ.pop(_THREADS, None)
        if before is not None:
            os.environ[_THREADS] = before


def finished_rows(sweep: Sweep) -> dict[str, Row]:
    """The finished rows of a sweep, by name.

    Raises:
        RequestError: the folder holds another sweep.
        CheckpointError: `sweep.json` is damaged.
    """
    path = sweep.folder / TABLE
    held = read_json(path, _Table)
    if held is None:
        return {}
    if held.asked != sweep.asked:
        raise RequestError(
            f"{path} is of another sweep:\n" + "\n".join(_differences(held.asked, sweep.asked)),
            "Give another --out, or the same options as before.",
        )
    return {row.name: row for row in held.rows}


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """One line for each key in which two requests differ."""
    for key in asked:
        before, now = (each if isinstance(each, list) else [each] for each in (held.get(key), asked[key]))
        gone, new = ([word for word in one if word not in other] for one, other in ((before, now), (now, before)))
        if gone or new:
            had, wanted = (" ".join(map(str, words)) for words in (gone, new))
            yield f"  - {key}: it has {had or 'less'}, you asked for {wanted or 'less'}"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    lines = ["| recipe | " + " | ".join(metrics) + " | model, MB | removed of the targets | seconds | peak, MB |"]
    lines.append("|---" * (len(metrics) + 5) + "|")
    for row in rows:
        values = " | ".join(_number(row.metrics.get(metric)) for metric in metrics)
        lines.append(
            f"| {row.name} | {values} | {row.nbytes / 1e6:.1f} | {row.removed:.1%} | {row.seconds:.0f} | "
            f"{row.peak_bytes / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e4 else f"{value:.2e}"
