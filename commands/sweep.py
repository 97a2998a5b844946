"""`lrc sweep`: many recipes on one model, one table."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import (
    calibration_overrides,
    checked,
    devices_of,
    dtype_of,
    located,
    names_of,
    quiet,
    ratio_of,
    require_calibration_fits,
    require_folder,
)
from .options import Activations, Calibrate, Device, Dtype, Length, Model, Samples, Seed, Set, Trust

if TYPE_CHECKING:
    from ..plan.plan import Draft
    from .sweep_rows import Job


def sweep(
    ctx: typer.Context,
    model: Model,
    recipes: Annotated[str, typer.Option(help="Recipes, comma-separated; 'all' takes every shipped one.")],
    out: Annotated[Path, typer.Option(help="Folder for the table, logs and shared statistics; the same command goes on.")],
    tasks: Annotated[str, typer.Option(help="As for lrc eval.")],
    ratios: Annotated[str, typer.Option(help="For recipes that leave the size to the budget, comma-separated.")] = "0.2,0.4",
    calibration: Calibrate = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    set_: Set = None,
    eval_length: Annotated[int, typer.Option(help="Tokens in each perplexity window (--length is calibration's).")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Only the first N windows of each perplexity task.")] = None,
    activations: Activations = None,
    parallel: Annotated[int, typer.Option(min=1, help="Rows at a time, each with its share of the cores.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Keep every compressed checkpoint.")] = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compress one model by many recipes and print one table: perplexity, bytes, seconds, memory."""
    from ..calibrate.data import load_calibration
    from ..evaluation.request import check_positions, prepare
    from ..run.pipeline import shared_statistics
    from .sweep_rows import Job, markdown, run_sweep
    from .terminal import plain_or_terminal

    require_folder(out)
    overrides = calibration_overrides(None, calibration, samples, length, seed)
    view, jobs, plans = _sweep_jobs(model, recipes, ratios, overrides, set_ or [], device, dtype, trust_remote_code)
    check_positions(view.config, eval_length, "--eval-length")
    prepare(names_of(tasks), length=eval_length, max_windows=max_windows, activations=activations)
    for each in plans:
        require_calibration_fits(view, each)
    # one calibration for all rows: the first recipe's, with as many windows held out as any of them needs
    held_out = max(plan.recipe.calibration.held_out for plan in plans)
    first = plans[0].recipe.calibration.model_copy(update={"held_out": held_out})
    tokens = load_calibration(first, view.location.tokenizer(trust_remote_code))
    shared_statistics(plans, view, tokens, out / "statistics", devices_of(device))
    common = ["--device", device, *(["--dtype", dtype] if dtype else [])]
    common += ["--trust-remote-code"] if trust_remote_code else []
    settings = [*(set_ or []), f"calibration={json.dumps(first.model_dump())}"]
    compress = [*common, "--statistics", str(out / "statistics"), *(word for each in settings for word in ("--set", each))]
    asked = {"--tasks": tasks, "--length": eval_length, "--max-windows": max_windows, "--activations": activations}
    evaluate = [*common, *(word for flag, value in asked.items() if value for word in (flag, str(value)))]
    console = plain_or_terminal()
    rows = run_sweep(
        model,
        [Job(None, nbytes=plans[0].whole_bytes), *jobs],
        out,
        ctx.obj,  # the command line's own main
        compress=compress,
        evaluate=evaluate,
        parallel=parallel,
        keep=keep,
        notify=lambda row: console.print(f"{row.name}: {row.metrics}, {row.seconds:.0f} s"),
    )
    table = markdown(rows)
    (out / "sweep.md").write_text(table)
    console.print(table)


def _sweep_jobs(
    model: str, recipes: str, ratios: str, overrides: dict[str, Any], settings: list[str], device: str, dtype: str | None,
    trust: bool,
) -> tuple[Any, list[Job], list[Draft]]:  # fmt: skip
    """The rows of a sweep, each planned before anything runs: (view, jobs, plans)."""
    from ..plan.load_recipe import load_recipe, shipped

    names = list(shipped()) if recipes == "all" else names_of(recipes, "--recipes")
    numbers = [ratio_of(text) for text in names_of(ratios, "--ratios")]
    readers = [partial(load_recipe, name, overrides, settings) for name in names]
    loaded = checked(*readers, lambda: dtype_of(dtype), lambda: devices_of(device))
    quiet()
    from ..model.view import ModelView
    from .sweep_rows import planned_jobs

    view = ModelView(located(model), dtype_of(dtype), trust)
    return view, *planned_jobs(view, dict(zip(names, loaded, strict=False)), numbers)
