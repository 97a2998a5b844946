"""`lrc sweep`: many recipes on one model, one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RequestError, together
from .common.arguments import (
    names_of,
    quiet,
    ratio_of,
    require_own,
)
from .common.options import Activations, CalibrationOptions, ModelOptions, grouped

if TYPE_CHECKING:
    from ..calibrate.data import Calibration, CalibrationSpec
    from ..evaluation.request import Request
    from ..model.view import ModelView
    from ..plan.plan import Draft
    from .sweep_rows import Job, Row, Sweep


@dataclass(frozen=True)
class SweepOptions:
    """Which rows there are, how they are evaluated, and where the table is written."""

    recipes: Annotated[str, typer.Option(help="Recipes, separated by commas, or all (every shipped one).")]
    out: Annotated[
        Path,
        typer.Option(help="Folder for the table, logs and shared statistics. The same command continues an interrupted sweep."),
    ]
    tasks: Annotated[str, typer.Option(help="What to measure, as for lrc eval.")]
    ratios: Annotated[
        str, typer.Option(help="Ratios for recipes that do not fix the size themselves, separated by commas.")
    ] = "0.2,0.4"
    eval_length: Annotated[int, typer.Option(help="Tokens in each perplexity window (--length is for calibration).")] = 2048
    max_windows: Annotated[int | None, typer.Option(show_default="all", help="Use only the first N windows of each text.")] = (
        None
    )
    activations: Activations = None
    parallel: Annotated[int, typer.Option(min=1, help="Number of rows to run at a time; they share the cores.")] = 1
    keep: Annotated[bool, typer.Option("--keep", help="Keep the compressed checkpoints.")] = False


@grouped
def sweep(options: SweepOptions, calibration: CalibrationOptions, source: ModelOptions) -> None:
    """Compare many recipes on one model.

    Compresses and measures the model with each recipe. Prints one table: metrics, bytes, seconds, memory.
    """
    from ..calibrate.data import load_calibration
    from ..checkpoint.atomic import write_text
    from ..checkpoint.opening import devices_of
    from ..evaluation.request import check_positions
    from ..run.pipeline import require_text_fits, shared_statistics
    from .common.console import plain_or_terminal
    from .sweep_rows import Job, finished_rows, markdown, run_sweep

    view, jobs, plans, request = _planned_rows(options, calibration, source)
    check_positions(view.config, options.eval_length, "--eval-length")
    for plan in plans:
        require_text_fits(view, plan)
    spec = _shared_calibration(plans)
    tokens = load_calibration(spec, view.location.tokenizer(source.trust_remote_code))
    described = _described(options, calibration, source, spec, _read_hashes(view, tokens, request))
    finished_rows(described)  # another sweep's statistics must not be replaced
    shared_statistics(plans, view, tokens, options.out / "statistics", devices_of(source.device))
    console = plain_or_terminal()
    rows = run_sweep(
        described,
        [Job(None, nbytes=plans[0].whole_bytes), *jobs],
        notify=lambda row: console.print(f"{row.name}: {row.metrics}, {row.seconds:.0f} s"),
    )
    table = markdown(rows)
    write_text(options.out / "sweep.md", table)
    console.print(table)
    for file in _drawn(options.out, source.model, rows):
        console.print(file)


def _drawn(out: Path, model: str, rows: Sequence[Row]) -> list[str]:
    """Draw the Pareto fronts as a page, and as pictures where something can draw them; the files, or why there are none."""
    from .. import __version__
    from ..checkpoint.atomic import write_text
    from ..report.front import Front, Point, front_figures
    from ..report.page import sweep_page
    from ..report.picture import HINT, can_draw, draw

    points = [Point(row.name, row.nbytes, row.metrics, row.speeds) for row in rows]
    front = Front(out.resolve().name, Path(model).name, __version__, points)
    write_text(out / "sweep.html", sweep_page(front))
    files = [str(out / "sweep.html")]
    if not can_draw():
        return [*files, f"note: no pictures beside the page. {HINT}"]
    for figure in front_figures(front):
        draw(figure, out / f"sweep-{figure.name}.png")
        files.append(str(out / f"sweep-{figure.name}.png"))
    return files


def _planned_rows(
    options: SweepOptions, calibration: CalibrationOptions, source: ModelOptions
) -> tuple[ModelView, list[Job], list[Draft], Request]:
    """The rows of a sweep, each planned before anything runs, and what is measured: (view, jobs, plans, request)."""
    from ..calibrate.available import require_available
    from ..checkpoint.location import is_on_hub
    from ..checkpoint.opening import devices_of, dtype_of, located
    from ..plan.load_recipe import load_recipe, shipped

    names = list(shipped()) if options.recipes == "all" else names_of(options.recipes, "--recipes")
    ratios = [ratio_of(text) for text in names_of(options.ratios, "--ratios")]
    with together() as check:
        recipes = {name: check(load_recipe, name, calibration.overrides, calibration.settings) for name in names}
        dtype = check(dtype_of, source.dtype)
        check(devices_of, source.device)
        check(require_own, options.out)
        request = check(_prepared, options)
        location = None if is_on_hub(source.model) else check(located, source.model)
        if location is not None:
            check(location.require_tokenizer)
        if (first := recipes[names[0]]) is not None and first.reads_text:
            check(require_available, first.calibration)
    quiet()
    from ..model.view import ModelView
    from .sweep_rows import planned_jobs

    view = ModelView(location or located(source.model), dtype, source.trust_remote_code)
    return view, *planned_jobs(view, recipes, ratios), request


def _prepared(options: SweepOptions) -> Request:
    """What is measured of every row, its texts read."""
    from ..evaluation.request import Settings, prepare

    if options.eval_length < 2:
        raise RequestError(f"--eval-length {options.eval_length}: a window needs 2 tokens at least.", "Papers use 2048.")
    return prepare(
        Settings(
            names_of(options.tasks),
            length=options.eval_length,
            max_windows=options.max_windows,
            activations=options.activations,
        )
    )


def _shared_calibration(plans: list[Draft]) -> CalibrationSpec:
    """One calibration set for all rows: the first recipe's, with as many windows held out as any of them needs."""
    held_out = max(plan.recipe.calibration.held_out for plan in plans)
    return plans[0].recipe.calibration.model_copy(update={"held_out": held_out})


def _read_hashes(view: ModelView, tokens: Calibration, request: Request) -> dict[str, str]:
    """sha256 of everything that the rows read: the checkpoint, the calibration set and the texts to evaluate on."""
    from ..calibrate.packing import token_hash

    checkpoint = {f"model's {kind}": sha256 for kind, sha256 in view.identity().items()}
    read = {"calibration tokens": tokens.hash, "held-out tokens": token_hash(tokens.held_out)}
    texts = {f"text of {task}": part["sha256"] for task, text in request.texts.items() for part in text.provenance}
    return checkpoint | read | texts


def _described(
    options: SweepOptions, calibration: CalibrationOptions, source: ModelOptions, shared: CalibrationSpec, read: dict[str, str]
) -> Sweep:
    """The sweep as its rows need it: what `lrc compress` and `lrc eval` are called with, and the hashes of what they read."""
    from .sweep_rows import Sweep

    common = ["--device", source.device]
    common += ["--dtype", source.dtype] if source.dtype else []
    common += ["--trust-remote-code"] if source.trust_remote_code else []
    compress = [*common, "--statistics", str(options.out / "statistics")]
    for setting in (*calibration.settings, f"calibration={json.dumps(shared.model_dump())}"):
        compress += ["--set", setting]
    evaluate = [*common, "--tasks", options.tasks, "--length", str(options.eval_length)]
    evaluate += ["--max-windows", str(options.max_windows)] if options.max_windows else []
    evaluate += ["--activations", options.activations] if options.activations else []
    return Sweep(source.model, options.out, compress, evaluate, options.parallel, options.keep, read)
