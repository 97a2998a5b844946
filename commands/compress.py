"""`lrc compress`: print the plan, then carry it out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import interruptible, require_calibration_fits
from .options import CalibrationOptions, ModelOptions, RecipeOptions, grouped
from .plan import note_calibration, planned


@grouped
def compress(
    out: Annotated[Path, typer.Option(help="Folder for the result. The same command continues an interrupted run.")],
    recipe: RecipeOptions,
    calibration: CalibrationOptions,
    source: ModelOptions,
    restart: Annotated[bool, typer.Option("--restart", help="Delete an earlier run in --out and start over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    statistics: Annotated[
        Path | None,
        typer.Option(
            show_default="not kept", help="Folder to keep the original model's statistics in, for use with other recipes."
        ),
    ] = None,
) -> None:
    """Compress a model into a smaller checkpoint.

    Prints the plan first, as lrc plan does.
    """
    from .terminal import Progress, print_calibration, print_plan

    view, plan, devices = planned(recipe, calibration, source, out)
    print_plan(plan)
    if dry_run:
        note_calibration(view, plan)
        return
    require_calibration_fits(view, plan)
    from ..calibrate.data import NO_TEXT, load_calibration
    from ..calibrate.generate import generator
    from ..run.run import execute, prepare

    texts = NO_TEXT
    if plan.recipe.reads_text:
        writer = generator(source.model, view.dtype, devices[0], source.trust_remote_code)
        texts = load_calibration(plan.recipe.calibration, view.location.tokenizer(source.trust_remote_code), writer)
        print_calibration(texts)
    with interruptible("the same command continues"), Progress(plan) as progress:
        if plan.recipe.max_ppl_increase is not None:
            from ..run.search import search

            plan = progress.plan = search(
                plan, view, texts, out, devices=devices, statistics=statistics, restart=restart, notify=progress.calibrated
            )
            restart = False  # the search has done it
        final, held = prepare(
            plan, view, texts, out, devices=devices, statistics=statistics, restart=restart, notify=progress.calibrated
        )
        progress.plan = final
        done = execute(
            final, view, texts, out, devices=devices, restart=restart, notify=progress.layer, refined=progress.refined,
            statistics=held,
        )  # fmt: skip
    if not done:
        print(f"{out} already holds this result; nothing to do (--restart makes it again).")
        return
    progress.finish(out)
