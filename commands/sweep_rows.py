"""A sweep: many recipes on one model, one table.

Each row is what a person would type, `lrc compress` and then `lrc eval`, in processes of their own, so that seconds and peak
memory are a row's own. Recipes that start from the original model share its statistics, collected once. Finished rows lie in
`sweep.json`; the same command goes on with what is missing.

Importing the libraries takes three seconds, twice a row. Where it is safe, on Linux without an accelerator, the processes are
forked from one that has imported them and done nothing else.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.atomic import read_json, write_json
from ..errors import BudgetError, RequestError, SweepError
from ..model.host_memory import peak_rss
from ..model.view import ModelView
from ..plan.plan import Draft
from ..plan.planner import make_draft
from ..plan.recipe import Recipe

TABLE = "sweep.json"
_LAST_LINES = 12
_LOOK = 0.2  # seconds between two looks at how much memory a row takes
_IMPORTS = [*(f"{__package__}.{name}" for name in ("run", "evaluate", "harness")), "transformers.modeling_layers"]
_THREADS = "OMP_NUM_THREADS"
_processes = threading.Lock()  # multiprocessing asks every child for its end when one is started, not safely from two threads

Main = Callable[[list[str]], None]
"""The command line: takes its words, raises SystemExit where it fails. A function of a module, so that a process finds it."""


@dataclass(frozen=True)
class Job:
    """One row to be: a recipe at a ratio (None where its settings fix the size), or with no recipe the model as it is.

    Args:
        settings: everything that the recipe says, calibration left out: a row of other settings is another row.
        nbytes: of the model's tensors, where it stays as it is.
    """

    recipe: str | None
    ratio: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    nbytes: int = 0

    @property
    def name(self) -> str:
        """As files and rows are called: 'svd-llm-0.2'."""
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
        seconds: of compressing, statistics shared with other rows left out.
        peak_bytes: resident memory of compressing.
        settings: what the recipe said, as in `Job`.
    """

    name: str
    metrics: dict[str, float]
    nbytes: int
    removed: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    commands: list[list[str]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Table:
    """The file of finished rows: what they were asked for, and they."""

    asked: dict[str, Any]
    rows: list[Row]


def planned_jobs(view: ModelView, recipes: Mapping[str, Recipe], ratios: Sequence[float]) -> tuple[list[Job], list[Draft]]:
    """The rows of a sweep and their plans; a recipe whose settings leave the size open is a row at each ratio."""
    jobs, plans = [], []
    for name, recipe in recipes.items():
        try:
            plans.append(make_draft(view, recipe))
            jobs.append(_job(name, recipe, recipe.ratio))
        except BudgetError:
            if any(each is not None for each in recipe.amounts.values()):
                raise  # the size is said, and cannot be met
            for ratio in ratios:
                plans.append(make_draft(view, recipe.model_copy(update={"ratio": ratio})))
                jobs.append(_job(name, recipe, ratio))
    _require_names(jobs)
    return jobs, plans


def _job(name: str, recipe: Recipe, ratio: float | None) -> Job:
    return Job(name, ratio, {key: value for key, value in recipe.resolved().items() if key not in ("calibration", "ratio")})


def _require_names(jobs: Sequence[Job]) -> None:
    """Refuse rows that would be called alike: one of them would stand for both."""
    named: dict[str, Job] = {Job(None).name: Job(None)}
    for job in jobs:
        if (other := named.setdefault(job.name, job)) is not job:
            what = " and ".join(f"{each.recipe or 'the model as it is'}" for each in (other, job))
            raise RequestError(
                f"Two rows would be called {job.name}: {what}.",
                "Name every recipe and every ratio once (six digits count), and files differently.",
            )


def run_sweep(
    model: str,
    jobs: Sequence[Job],
    folder: Path,
    main: Main,
    *,
    compress: Sequence[str],
    evaluate: Sequence[str],
    parallel: int = 1,
    keep: bool = False,
    notify: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Carry out what is missing of a sweep and return all rows in the order of `jobs`.

    Args:
        model: as `lrc compress` takes it.
        folder: for `sweep.json`, statistics and logs; created if need be.
        main: carries out `compress …` and `eval …`, in a process each.
        compress: further arguments of `lrc compress`, the same for every row.
        evaluate: further arguments of `lrc eval`.
        parallel: rows at a time, each with its share of the cores.
        keep: leave the compressed checkpoints in the folder.

    Raises:
        RequestError: the folder holds a sweep of something else.
        SweepError: rows failed; names them with the last lines of their logs. Finished rows stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"model": model, "compress": list(compress), "evaluate": list(evaluate)}
    rows = _finished(folder, asked)
    failures: dict[str, str] = {}
    finished = threading.Lock()

    def one(job: Job) -> None:
        """A row, unless it is there already, of these settings; failures are gathered."""
        if job.name in rows:
            if rows[job.name].settings == job.settings:
                return
            shutil.rmtree(folder / job.name, ignore_errors=True)  # a checkpoint that was kept
        try:
            row = _row(model, job, folder, main, compress, evaluate, keep)
        except SweepError as error:
            failures.update(error.failures)
            return
        with finished:  # rows end beside each other
            rows[job.name] = row
            _write(folder, asked, rows)
            notify(row)

    # every recipe's first ratio before any second one: rows of one recipe beside each other would both measure its losses
    turns = sorted(range(len(jobs)), key=lambda place: sum(job.recipe == jobs[place].recipe for job in jobs[:place]))
    with _threads(parallel), ThreadPoolExecutor(parallel) as pool:
        list(pool.map(one, (jobs[place] for place in turns)))
    if failures:
        raise SweepError(failures)
    return [rows[job.name] for job in jobs]


def _row(model: str, job: Job, folder: Path, main: Main, compress: Sequence[str], evaluate: Sequence[str], keep: bool) -> Row:
    out, log, scores = folder / job.name, folder / f"{job.name}.log", folder / f"{job.name}.json"
    commands: list[list[str]] = []
    seconds, peak = 0.0, 0
    if job.recipe is not None:
        ratio = [] if job.ratio is None else ["--ratio", f"{job.ratio:g}"]
        command = ["compress", model, "--recipe", job.recipe, *ratio, "--out", str(out), *compress]
        commands.append(["lrc", *command])
        seconds, peak = _run(main, command, log)
    command = ["eval", str(out) if job.recipe is not None else model, "--json", str(scores), *evaluate]
    commands.append(["lrc", *command])
    _run(main, command, log)
    metrics = {name: result["value"] for name, result in json.loads(scores.read_text())["results"].items()}
    held: dict[str, Any] = {}
    if job.recipe is not None:
        held = _sizes(out)
        (folder / f"{job.name}.lrc.json").write_text((out / "lrc.json").read_text())
        if not keep:
            shutil.rmtree(out)
    nbytes, removed = held.get("nbytes", job.nbytes), held.get("removed", 0.0)
    return Row(job.name, metrics, nbytes, removed, seconds, peak, commands, dict(job.settings))


def _sizes(out: Path) -> dict[str, Any]:
    record = json.loads((out / "lrc.json").read_text())
    return {"nbytes": record["bytes"]["model_after"], "removed": record["ratio"]}


@contextlib.contextmanager
def _threads(parallel: int) -> Iterator[None]:
    """Processes started meanwhile take their share of the cores."""
    before = os.environ.get(_THREADS)
    if parallel > 1:
        os.environ[_THREADS] = str(max(1, (os.cpu_count() or 1) // parallel))
    try:
        yield
    finally:
        os.environ.pop(_THREADS, None)
        if before is not None:
            os.environ[_THREADS] = before


def _run(main: Main, command: Sequence[str], log: Path) -> tuple[float, int]:
    """Run a command to its end in a process of its own: (seconds, peak resident bytes).

    Raises:
        SweepError: it failed; its last lines say why.
    """
    # a device cannot be used by a process that was forked after it was looked for, and importing may look
    forked = sys.platform == "linux" and not torch.accelerator.is_available()
    context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
    context.set_forkserver_preload(_IMPORTS)
    process = context.Process(target=_typed, args=(main, list(command), log, os.environ.get(_THREADS)))
    log.touch()
    started, peak = time.perf_counter(), 0
    with _processes:
        process.start()
    while True:
        peak = max(peak, peak_rss(process.pid))  # nobody can be asked when it has ended
        multiprocessing.connection.wait([process.sentinel], _LOOK)
        with _processes:
            if process.exitcode is not None:
                break
    if process.exitcode:
        last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        if process.exitcode < 0:  # it could not say so itself
            last.append(f"The process was ended by signal {-process.exitcode}; signal 9 is what a system without memory sends.")
        raise SweepError({log.stem: "\n".join(last)})
    return time.perf_counter() - started, peak


def _typed(main: Main, command: list[str], log: Path, threads: str | None) -> None:
    """In the process: what the command says goes to the log."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if threads and threads.isdecimal():  # the process this one was forked from may have been started for another share
        torch.set_num_threads(int(threads))
    main(command)


def _finished(folder: Path, asked: dict[str, Any]) -> dict[str, Row]:
    path = folder / TABLE
    held = read_json(path, _Table)
    if held is None:
        return {}
    if held.asked != asked:
        raise RequestError(
            f"{path} is of another sweep:\n" + "\n".join(_differences(held.asked, asked)),
            "Give another --out, or what it was asked for before.",
        )
    return {row.name: row for row in held.rows}


def _differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """One line per word that only one of two requests has."""
    for key in asked:
        before, now = (each if isinstance(each, list) else [each] for each in (held.get(key), asked[key]))
        gone, new = ([word for word in one if word not in other] for one, other in ((before, now), (now, before)))
        if gone or new:
            had, wanted = (" ".join(map(str, words)) for words in (gone, new))
            yield f"  - {key}: it has {had or 'less'}, you asked for {wanted or 'less'}"


def _write(folder: Path, asked: dict[str, Any], rows: dict[str, Row]) -> None:
    write_json(folder / TABLE, _Table(asked, list(rows.values())), indent=2)


def markdown(rows: Sequence[Row]) -> str:
    """The table as a Markdown document's part."""
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
