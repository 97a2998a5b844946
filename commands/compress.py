"""`lrc compress`: print the plan, then carry it out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common.arguments import interruptible
from .common.options import CalibrationOptions, MaxShardSize, ModelOptions, RecipeOptions, grouped
from .plan import drafted, note_calibration, requested


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
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Compress a model into a smaller checkpoint.

    Prints the plan first, as lrc plan does.
    """
    from ..run.pipeline import run_request
    from .common.terminal import Progress, print_plan

    request = requested(recipe, calibration, source, out, max_shard_size)
    if dry_run:
        view, draft = drafted(request)
        print_plan(draft)
        note_calibration(view, draft)
        return
    with interruptible("the same command continues"), Progress() as progress:
        result = run_request(request, out, statistics, restart, progress)
    if not result.made:
        print(f"{out} holds this very result already; nothing to do (--restart makes it anew).")
        return
    progress.finish(out)
