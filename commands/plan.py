"""`lrc plan`: what a compression would do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CalibrationError, RequestError
from .arguments import devices_of, dtype_of, located, quiet, require_calibration_fits, together
from .options import CalibrationOptions, ModelOptions, RecipeOptions, grouped

if TYPE_CHECKING:
    import torch

    from ..model.view import ModelView
    from ..plan.plan import Plan


@grouped
def plan(
    recipe: RecipeOptions,
    calibration: CalibrationOptions,
    source: ModelOptions,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every target and everything that is kept.")] = False,
) -> None:
    """Print what lrc compress would do.

    Reads only the headers of the weight files, and one layer's weights where sub-layers may be pruned.
    """
    from .terminal import print_plan

    view, made, _ = planned(recipe, calibration, source)
    print_plan(made, verbose=verbose)
    note_calibration(view, made)


def planned(
    recipe: RecipeOptions, calibration: CalibrationOptions, source: ModelOptions, out: Path | None = None
) -> tuple[ModelView, Plan, list[torch.device]]:
    """Check a request from the cheapest part to the dearest, then make the plan: (view, plan, devices).

    Args:
        out: the folder for the result, where there is to be one.

    Raises:
        LrcError: something in the request is wrong; several mistakes are reported together.
    """
    from ..checkpoint.artifact import require_usable
    from ..plan.load_recipe import load_recipe

    with together() as check:
        wanted = check(load_recipe, recipe.recipe, recipe.overrides | calibration.overrides, calibration.settings)
        dtype = check(dtype_of, source.dtype)
        devices = check(devices_of, source.device)
        if out is not None:
            check(require_usable, out)
    quiet()
    from ..model.view import ModelView
    from ..plan.planner import make_plan

    location = located(source.model)
    if out is not None and out.resolve() == location.path.resolve():
        raise RequestError(f"--out {out} is the folder of the model itself.", "Give another folder.")
    view = ModelView(location, dtype, source.trust_remote_code)
    return view, make_plan(view, wanted, len(devices)), devices


def note_calibration(view: ModelView, plan: Plan) -> None:
    """Print with a plan that `lrc compress` would refuse its calibration set."""
    try:
        require_calibration_fits(view, plan)
    except CalibrationError as error:
        print(f"note: {error.what} {error.remedy}")
