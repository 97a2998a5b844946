"""Options that several commands have alike, in groups; and the decorator that lets a command take a group as one value."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the recipe; dotted; repeatable; flags win."),
]
Activations = Annotated[
    str | None, typer.Option(help="int8 or mxint8: round what the layers' matrices read (of the original or baseline, too).")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the checkpoint run.")]


@dataclass(frozen=True)
class RecipeOptions:
    """Which recipe, how much it removes, and which statistics it takes."""

    recipe: Annotated[str, typer.Option(help="A shipped recipe (lrc recipe list) or a YAML file.")] = "lrc-fast"
    ratio: Annotated[float | None, typer.Option(help="Fraction of the compressed matrices' bytes to remove, 0 to below 1.")] = (
        None
    )
    bits: Annotated[
        float | None, typer.Option(help="In place of --ratio: mean bits per compressed weight, everything counted.")
    ] = None
    size: Annotated[
        str | None, typer.Option(help="In place of --ratio: of the files with the weights, such as 300MB or 1.5GiB.")
    ] = None
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(help="In place of --ratio: how far perplexity on held-out calibration text may rise, such as 5%."),
    ] = None
    propagate: Annotated[str | None, typer.Option(help="original (one-shot) or compressed (sequential).")] = None

    @property
    def overrides(self) -> dict[str, Any]:
        """Key of the recipe -> its value, None where the option was not given."""
        keys = ("ratio", "bits", "size", "max_ppl_increase", "propagate")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class CalibrationOptions:
    """The calibration set, and any other key of the recipe."""

    calibration: Annotated[
        str | None, typer.Option(help="wikitext2, c4, text:PATH, jsonl:PATH, pydoc, self, a*0.5+b*0.5 …")
    ] = None
    samples: Annotated[int | None, typer.Option(help="Calibration samples.")] = None
    length: Annotated[int | None, typer.Option(help="Tokens in each calibration sample.")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of calibration samples and sampled labels.")] = None
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
        """What `--set` was given, each as KEY=VALUE."""
        return self.set_ or []


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is read."""

    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or pkg:PACKAGE/FILE.")]
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0,cuda:1 (the work is spread over them), or auto.")] = "cpu"
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")] = None
    trust_remote_code: Trust = False


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer takes it, with one parameter for each option, of a command that takes groups of options.

    Args:
        command: a function; its parameters that are annotated with a dataclass are groups, every field of which is an option.
            The others are options themselves.
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
