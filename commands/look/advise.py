"""`lrc advise`: which recipes reach a size, and what they would lose."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import BudgetError, RequestError, together
from ..common.arguments import interruptible, names_of, quiet
from ..common.json_output import Json, answered, require_json
from ..common.options import ModelOptions, grouped
from .inspect import calibration_of

if TYPE_CHECKING:
    from ...model.view import ModelView
    from ...run.advice.candidates import Candidate

_SOURCE, _HELD_OUT = "pydoc", 4


@dataclass(frozen=True)
class Wanted:
    """How small the result shall be; one of the three."""

    size: Annotated[str | None, typer.Option(help="Size of the weight files, such as 300MB or 4GB.")] = None
    ratio: Annotated[float | None, typer.Option(help="Instead: fraction of the compressed matrices' bytes to remove.")] = None
    memory: Annotated[
        str | None, typer.Option(help="Instead: resident memory of a process that runs the result, such as 6GB.")
    ] = None
    context: Annotated[
        int, typer.Option(min=1, help="With --memory: tokens of the one sequence whose keys and values count.")
    ] = 2048

    @property
    def given(self) -> list[str]:
        """The names of the options that were given."""
        return [name for name in ("size", "ratio", "memory") if getattr(self, name) is not None]


@grouped
def advise(
    wanted: Wanted,
    source: ModelOptions,
    recipes: Annotated[
        str | None,
        typer.Option(show_default="one of each quick kind", help="Recipes to try, with commas: names or YAML files."),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers that are compressed in a trial.")] = 6,
    calibration: Annotated[
        str | None, typer.Option(show_default="pydoc", help="Text for the trials; the commands name it too, where it is given.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of it in a trial.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in each sample.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed for drawing samples.")] = 0,
    json_file: Json = None,
) -> None:
    """Name two or three recipes for a size, with predicted loss and bytes and the command for each.

    Plans recipes, tries those that reach the size on a few layers, and says what it does not know. Trials are written to a
    temporary folder (TMPDIR).
    """
    from ...checkpoint.location import is_on_hub
    from ...checkpoint.opening import devices_of, dtype_of, located
    from ...run.advice.candidates import LONGER, TRIED

    with together() as check:
        check(require_json, json_file)
        check(_require_amount, wanted)
        names = list(TRIED) if recipes is None else check(_recipes, recipes)
        dtype, devices = check(dtype_of, source.dtype), check(devices_of, source.device)
        spec = check(calibration_of, calibration or _SOURCE, samples, length, seed, _HELD_OUT)
        location = None if is_on_hub(source.model) else check(located, source.model)
        if location is not None:
            check(location.require_tokenizer)
    quiet()
    from ...calibrate.data import load_calibration
    from ...model.view import ModelView, require_positions
    from ...run.advice.advice import tried
    from ...run.advice.candidates import candidates
    from .advise_output import answer, print_advice
    from .progress import Steps

    view = ModelView(location or located(source.model), dtype, source.trust_remote_code)
    require_positions(view.config, length, "--length")
    amount = _amount(view, wanted)
    found, refused = candidates(view, names, amount, devices)
    if not found:
        listed = "\n".join(f"  - {name}: {why}" for name, why in refused.items())
        raise BudgetError(f"None of {len(refused)} recipes reaches it:\n{listed}", "Ask for less, or name others (--recipes).")
    untried, _ = candidates(view, [] if recipes else list(LONGER), amount, devices)
    with interruptible("nothing was written"), Steps("statistics for all trials") as steps:
        text = load_calibration(spec, view.location.tokenizer(source.trust_remote_code))
        trials, failed = tried(view, found, text, spec, layers, devices, steps)
    told = {
        "model": source.model, "asked": {name: getattr(wanted, name) for name in wanted.given}, "amount": amount,
        "text": calibration or _SOURCE, "layers": len(view.layers),
        **answer(trials, refused | failed, untried, lambda candidate: _command(source, candidate, calibration)),
    }  # fmt: skip
    if not answered(json_file, told):
        print_advice(told)


def _command(source: ModelOptions, candidate: Candidate, calibration: str | None) -> str:
    """The command that makes a result by a recipe, as a person would type it."""
    option, value = candidate.amount
    words = ["lrc", "compress", source.model, "--recipe", candidate.name, f"--{option}", value]
    for name, given in (("--calibration", calibration), ("--dtype", source.dtype)):
        words += [] if given is None else [name, given]
    words += ["--device", source.device] if source.device != "cpu" else []
    return shlex.join([*words, *(["--trust-remote-code"] if source.trust_remote_code else [])])


def _require_amount(wanted: Wanted) -> None:
    from ...plan.budget import bytes_of, checked_ratio

    if len(wanted.given) != 1:
        said = f"{len(wanted.given)} of --size, --ratio and --memory are given" if wanted.given else "How small shall it be?"
        raise RequestError(f"{said}.".replace("?.", "?"), "Give one of --size 4GB, --ratio 0.4 and --memory 6GB.")
    (name,) = wanted.given
    try:
        if name == "ratio":
            if checked_ratio(wanted.ratio or 0.0) == 0:
                raise ValueError("0 removes nothing; 0.4 removes 40 % of the targets' bytes")
        else:
            bytes_of(getattr(wanted, name))
    except ValueError as error:
        raise RequestError(f"--{name} '{getattr(wanted, name)}' {error}.") from None


def _recipes(text: str) -> list[str]:
    """The recipes of `--recipes`, each of which can be read.

    Raises:
        RequestError: there is none, or some cannot be read.
    """
    from ...plan.load_recipe import load_recipe

    names = names_of(text, "--recipes")
    with together() as check:
        for name in names:
            check(load_recipe, name)
    return list(dict.fromkeys(names))


def _amount(view: ModelView, wanted: Wanted) -> dict[str, Any]:
    from ...plan.budget import bytes_of
    from ...run.advice.memory import size_for

    if wanted.ratio is not None:
        return {"ratio": wanted.ratio}
    if wanted.size is not None:
        return {"size": wanted.size}
    size = size_for(view, bytes_of(wanted.memory or ""), wanted.context)
    return {"size": f"{size // 100_000 / 10:g}MB"}
