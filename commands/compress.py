"""`lrc compress`: print the plan, then carry it out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common.arguments import interruptible
from .common.options import CalibrationOptions, MaxShardSize, ModelOptions, RecipeOptions, grouped
from .plan import Output, drafted, into_folder, note_calibration


@grouped
def compress(
    recipe: RecipeOptions,
    calibration: CalibrationOptions,
    source: ModelOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            show_default="MODEL-RECIPE-AMOUNT",
            help="Folder for the result, new or empty. The same command continues an interrupted run.",
        ),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete an earlier run in --out and start over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Measure a quick perplexity before and after, at the end.")
    ] = True,
    timed: Annotated[
        bool,
        typer.Option("--time/--no-time", help="Measure this machine for some seconds, and say how long the run will take."),
    ] = True,
    statistics: Annotated[
        Path | None,
        typer.Option(
            show_default="not kept", help="Folder to keep the original model's statistics in, for use with other recipes."
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Compress a model into a smaller checkpoint.

    Prints the plan first, as lrc plan does.
    """
    named = out
    request, out = into_folder(recipe, calibration, source, Output(named, statistics, max_shard_size), hub=not dry_run)
    from ..run.pipeline import run_request
    from .common.console import messages, plain_or_terminal
    from .common.plan_output import print_plan
    from .common.terminal import Progress
    from .common.time_output import print_duration

    if dry_run:
        view, draft = drafted(request)
        print_plan(draft)
        print_duration(None, draft)
        note_calibration(view, draft)
        return
    if named is None:
        messages().print(f"The result goes into the folder {out} (--out names another).")
    with interruptible("the same command continues"), Progress() as progress:
        result = run_request(request, out, statistics, restart, progress, timed, check)
    if not result.made:
        plain_or_terminal().print(f"{out} holds this very result already; nothing to do (--restart makes it anew).")
        return
    progress.finish(out)
    if check:
        with interruptible("the result is finished"):
            progress.checked(out, request)
