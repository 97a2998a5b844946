"""`lrc plan`: what a compression would do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CalibrationError
from .common.arguments import quiet, together
from .common.options import CalibrationOptions, MaxShardSize, ModelOptions, RecipeOptions, grouped

if TYPE_CHECKING:
    from ..model.view import ModelView
    from ..plan.plan import Draft
    from ..run.request import Request


@grouped
def plan(
    recipe: RecipeOptions,
    calibration: CalibrationOptions,
    source: ModelOptions,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every target and everything that is kept.")] = False,
    max_shard_size: MaxShardSize = "5GB",
) -> None:
    """Print what lrc compress would do.

    Reads the headers of the weight files, the scales of fp8 weights, tied weights that are in the files twice, and one layer's
    weights where sub-layers may be pruned.
    """
    from .common.terminal import print_plan

    view, draft = drafted(requested(recipe, calibration, source, shards=max_shard_size))
    print_plan(draft, verbose=verbose)
    note_calibration(view, draft)


def requested(
    recipe: RecipeOptions, calibration: CalibrationOptions, source: ModelOptions, out: Path | None = None, shards: str = "5GB"
) -> Request:
    """What the options ask for, checked from the cheapest part to the dearest.

    Args:
        out: the folder for the result, where there is to be one.
        shards: the largest weight file of the result.

    Raises:
        LrcError: something in the request is wrong; several mistakes are reported together.
    """
    from ..checkpoint.folder import require_usable
    from ..checkpoint.opening import devices_of, dtype_of, located
    from ..plan.load_recipe import load_recipe
    from ..run.request import Request, shard_bytes

    with together() as check:
        wanted = check(load_recipe, recipe.recipe, recipe.overrides | calibration.overrides, calibration.settings)
        dtype = check(dtype_of, source.dtype)
        devices = check(devices_of, source.device)
        most = check(shard_bytes, shards)
        if out is not None:
            check(require_usable, out)
    quiet()
    request = Request(located(source.model), wanted, tuple(devices), dtype, source.trust_remote_code, most)
    if out is not None:
        request.require_folder(out)
    return request


def drafted(request: Request) -> tuple[ModelView, Draft]:
    """The model of a request, and the draft of its plan."""
    from ..plan.planner import make_draft

    view = request.view()
    draft = make_draft(view, request.recipe, len(request.devices))
    return view, replace(draft, max_shard_bytes=request.max_shard_bytes)


def note_calibration(view: ModelView, draft: Draft) -> None:
    """Print with a plan that `lrc compress` would refuse its calibration set."""
    from ..run.pipeline import require_text_fits

    try:
        require_text_fits(view, draft)
    except CalibrationError as error:
        print(f"note: {error.what} {error.remedy}")
