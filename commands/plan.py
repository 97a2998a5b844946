"""`lrc plan`: what a compression would do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CalibrationError, together
from .common.arguments import quiet
from .common.json_output import Json, answered, require_json
from .common.options import CalibrationOptions, MaxShardSize, ModelOptions, RecipeOptions, grouped

if TYPE_CHECKING:
    from ..model.view import ModelView
    from ..plan.plan import Draft
    from ..run.request import Request


@dataclass(frozen=True)
class Output:
    """What a result is written to.

    Args:
        folder: for the result; None names it after the request.
        statistics: a folder that keeps the statistics, where one is given.
        shards: the largest weight file, as on the command line; None is the default.
    """

    folder: Path | None = None
    statistics: Path | None = None
    shards: str | None = None


@grouped
def plan(
    recipe: RecipeOptions,
    calibration: CalibrationOptions,
    source: ModelOptions,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every target and everything that is kept.")] = False,
    max_shard_size: MaxShardSize = "5GB",
    timed: Annotated[
        bool,
        typer.Option("--time", help="Also say how long the run will take: reads one layer, and measures this machine."),
    ] = False,
    json_file: Json = None,
) -> None:
    """Print what lrc compress would do.

    Reads the headers of the weight files, the scales of fp8 weights, tied weights that are in the files twice, and one layer's
    weights where sub-layers may be pruned.
    """
    require_json(json_file)
    request = requested(recipe, calibration, source, max_shard_size)
    view, draft = drafted(request)
    from .common.plan_output import plan_json, print_plan
    from .common.time_output import duration_json, print_duration

    duration = None
    if timed:
        from ..run.duration.foretell import foretell

        duration = foretell(request.view(), draft, Path.cwd(), request.devices)
    if answered(json_file, plan_json(draft) | ({} if duration is None else {"time": duration_json(duration)})):
        return
    print_plan(draft, verbose=verbose)
    print_duration(duration, draft)
    note_calibration(view, draft)


def requested(
    recipe: RecipeOptions, calibration: CalibrationOptions, source: ModelOptions, shards: str | None = None
) -> Request:
    """What the options ask for, checked from the cheapest part to the dearest.

    Args:
        shards: the largest weight file of the result.

    Raises:
        LrcError: something in the request is wrong; several mistakes are reported together.
    """
    return _checked(recipe, calibration, source, Output(shards=shards), hub=False)


def into_folder(
    recipe: RecipeOptions,
    calibration: CalibrationOptions,
    source: ModelOptions,
    output: Output,
    hub: bool = True,
) -> tuple[Request, Path]:
    """What the options ask for, and the folder of its result: the one in `output`, or one that is named after the request.

    Args:
        output: what the result is written to.
        hub: refuse calibration text on a hub that is out of reach.

    Raises:
        LrcError: something in the request is wrong, or the folder holds something else; all mistakes are reported together.
    """
    from .common.naming import default_folder

    request = _checked(recipe, calibration, source, output, hub)
    out = output.folder
    if out is None:
        out = default_folder(source.model, recipe.recipe, request.recipe)
    request.require_folder(out)
    return request, out


def _checked(
    recipe: RecipeOptions,
    calibration: CalibrationOptions,
    source: ModelOptions,
    output: Output,
    hub: bool,
) -> Request:
    from ..calibrate.store import require_for_statistics
    from ..checkpoint.folder import require_usable
    from ..checkpoint.location import is_on_hub
    from ..checkpoint.opening import devices_of, dtype_of, located
    from ..plan.load_recipe import load_recipe, recorded_dtype
    from ..run.request import Request, require_possible, shard_bytes

    with together() as check:
        wanted = check(load_recipe, recipe.recipe, recipe.overrides | calibration.overrides, calibration.settings)
        dtype = check(dtype_of, source.dtype) or check(recorded_dtype, recipe.recipe)
        devices = check(devices_of, source.device)
        most = check(shard_bytes, output.shards)
        for folder, require in ((output.folder, require_usable), (output.statistics, require_for_statistics)):
            if folder is not None:
                check(require, folder)
        # a model of the hub is downloaded only for a request without mistakes
        location = None if is_on_hub(source.model) else check(located, source.model)
        if wanted is not None:
            check(require_possible, wanted, location, hub)
    quiet()
    return Request(location or located(source.model), wanted, tuple(devices), dtype, source.trust_remote_code, most)


def drafted(request: Request) -> tuple[ModelView, Draft]:
    """The model of a request, and the draft of its plan."""
    from ..plan.planner import make_draft

    view = request.view()
    draft = make_draft(view, request.recipe, request.devices)
    return view, replace(draft, max_shard_bytes=request.max_shard_bytes)


def note_calibration(view: ModelView, draft: Draft) -> None:
    """Print with a plan that `lrc compress` would refuse its calibration set."""
    from ..calibrate.available import require_available
    from ..model.view import require_positions
    from .common.console import plain_or_terminal

    if not draft.recipe.reads_text:
        return
    calibration = draft.recipe.calibration
    for check in (
        lambda: require_positions(view.config, calibration.length, "calibration.length"),
        lambda: require_available(calibration),
    ):
        try:
            check()
        except CalibrationError as error:
            plain_or_terminal().print(f"note: {error.what} {error.remedy}")
