"""Options that several commands share, in groups; and the decorator that lets a command take a group as one value."""

from __future__ import annotations

import functools
import importlib.resources
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any key of the recipe, such as calibration.samples=64. May be repeated. An option for the same key wins.",
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        show_default="no rounding",
        help="Round the inputs of the layers' matrices to int8 or mxint8 (also in the original or the baseline).",
    ),
]
MaxShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 5GB; a single tensor may be larger.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")]


def recipe_names(incomplete: str) -> list[str]:
    """The shipped recipes that begin so, for the shell; by the names of their files, so that it is quick."""
    files = importlib.resources.files("lrc.recipes").iterdir()
    names = sorted(entry.name.removesuffix(".yaml") for entry in files if entry.name.endswith(".yaml"))
    return [name for name in names if name.startswith(incomplete)]


@dataclass(frozen=True)
class RecipeOptions:
    """Which recipe, how much it removes, and which statistics it takes."""

    recipe: Annotated[
        str,
        typer.Option(
            help="A shipped recipe (see lrc recipe list), a YAML file, or lrc.json of a result, whose run is repeated.",
            autocompletion=recipe_names,
        ),
    ] = "lrc-fast"
    ratio: Annotated[
        float | None,
        typer.Option(
            show_default="the recipe's", help="Fraction of the compressed matrices' bytes to remove: at least 0, below 1."
        ),
    ] = None
    bits: Annotated[
        float | None, typer.Option(help="Instead of --ratio: mean bits per compressed weight, scales and factors included.")
    ] = None
    size: Annotated[str | None, typer.Option(help="Instead of --ratio: size of the weight files, such as 300MB or 1.5GiB.")] = (
        None
    )
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(help="Instead of --ratio: how much perplexity on held-out calibration text may rise, such as 5%."),
    ] = None
    propagate: Annotated[
        str | None,
        typer.Option(
            show_default="the recipe's",
            help="Model that the statistics come from: original (one-shot) or compressed (layer by layer).",
        ),
    ] = None

    @property
    def overrides(self) -> dict[str, Any]:
        """Key of the recipe -> its value, None where the option was not given."""
        keys = ("ratio", "bits", "size", "max_ppl_increase", "propagate")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class CalibrationOptions:
    """The calibration set, and any other key of the recipe."""

    calibration: Annotated[
        str | None,
        typer.Option(
            show_default="the recipe's",
            help="Calibration set: wikitext2, c4, ptb, pile, pydoc, self (the model writes it), text:PATH (.txt, .jsonl, "
            ".json, .csv, .parquet, also .gz and .zst), jsonl:PATH:FIELD, csv:PATH:COLUMN, parquet:PATH:COLUMN, hf:NAME; or a "
            "mixture such as c4*0.5+self*0.5.",
        ),
    ] = None
    samples: Annotated[int | None, typer.Option(show_default="the recipe's", help="Number of calibration samples.")] = None
    length: Annotated[int | None, typer.Option(show_default="the recipe's", help="Tokens in each calibration sample.")] = None
    seed: Annotated[
        int | None, typer.Option(show_default="the recipe's", help="Seed for drawing calibration samples and labels.")
    ] = None
    set_: Set = None

    @property
    def overrides(self) -> dict[str, Any]:
        """Dotted key of the recipe -> its value, None where the option was not given."""
        return {
            "calibration.source": self.calibration,
            "calibration.samples": self.samples,
            "calibration.length": self.length,
            "calibration.seed": self.seed,
            "gradients.seed": self.seed,
        }

    @property
    def settings(self) -> list[str]:
        """The values of `--set`, each as KEY=VALUE."""
        return self.set_ or []


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is read."""

    model: Annotated[
        str, typer.Argument(help="Hub id, folder, .gguf file, or pkg:PACKAGE/FILE (a file of an installed package).")
    ]
    device: Annotated[
        str,
        typer.Option(help="Where to compute: cpu, cuda, several GPUs such as cuda:0,cuda:1, or auto (all GPUs, else the CPU)."),
    ] = "cpu"
    dtype: Annotated[
        str | None, typer.Option(show_default="the checkpoint's", help="Dtype of the weights: float32, bfloat16 or float16.")
    ] = None
    trust_remote_code: Trust = False


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a command that takes groups of options into a function with one parameter for each option, as typer needs it.

    Args:
        command: a function. A parameter that is annotated with a dataclass is a group: each of its fields is an option. Every
            other parameter is an option itself.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            options += _fields_as_parameters(groups[name])
        else:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    flat.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    flat.__annotations__ = {option.name: option.annotation for option in options}
    return flat


def _fields_as_parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
