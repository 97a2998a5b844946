"""`lrc inspect`: what a model's matrices are like, before it is compressed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import RequestError, did_you_mean, together
from ..common.arguments import interruptible, quiet, require_writable
from ..common.json_output import Json, answered, require_json
from ..common.options import Trust

if TYPE_CHECKING:
    from ...calibrate.data import CalibrationSpec
    from ...evaluation.inspection import Inspection


def inspect(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, .gguf file, or pkg:PACKAGE/FILE (a file of an installed package).")
    ],
    calibration: Annotated[
        str | None,
        typer.Option(show_default="weights alone", help="Text on which outputs are looked at, such as pydoc or text:FILE."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples of that text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens in each sample.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed for drawing samples.")] = 0,
    shown: Annotated[
        str,
        typer.Option(
            "--map", help="What the map shows: energy-0.2, energy-0.4, energy-0.6, rank, largest, kurtosis, input, none."
        ),
    ] = "energy-0.4",
    html: Annotated[
        Path | None, typer.Option(show_default="not written", help="Write a page with all figures to this file.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda, several GPUs such as cuda:0,cuda:1, or auto.")
    ] = "cpu",
    trust_remote_code: Trust = False,
    json_file: Json = None,
) -> None:
    """Look at a model's matrices: spectra, effective ranks, energy kept at ratios, outliers.

    Reads one layer at a time. With --calibration, outputs on that text are looked at, too: this is what svd-llm sees.
    """
    from ...checkpoint.location import is_on_hub
    from ...checkpoint.opening import devices_of, located

    with together() as check:
        check(require_json, json_file)
        check(_require_page, html)
        check(_require_map, shown, calibration)
        devices = check(devices_of, device)
        spec = check(calibration_of, calibration, samples, length, seed)
        location = None if is_on_hub(model) else check(located, model)
        if location is not None and spec is not None:
            check(location.require_tokenizer)
    quiet()
    from ...calibrate.data import load_calibration
    from ...evaluation.inspection import inspected
    from ...model.view import ModelView, require_positions
    from .progress import Steps

    view = ModelView(location or located(model), None, trust_remote_code)
    with interruptible("nothing was written"):
        text = None
        if spec is not None:
            require_positions(view.config, length, "--length")
            text = load_calibration(spec, view.location.tokenizer(trust_remote_code))
        with Steps("reading the model") as steps:
            found = inspected(view, text, devices, steps)
    _show(found, shown, html, json_file)


def _show(found: Inspection, shown: str, html: Path | None, json_file: str | None) -> None:
    """Write the page, then answer in JSON or print the tables and the map."""
    from .inspect_output import print_inspection

    if html is not None:
        from ...checkpoint.atomic import write_text
        from ...report.inspection import inspection_page

        write_text(html, inspection_page(found))
    if answered(json_file, found.as_json()):
        return
    print_inspection(found, shown)
    if html is not None:
        print(html)


def calibration_of(source: str | None, samples: int, length: int, seed: int, held_out: int = 0) -> CalibrationSpec | None:
    """A checked calibration set whose text can be had; None without a source.

    Raises:
        RequestError: the source is none, or writes text with the model itself.
        CalibrationError: its text is not there.
    """
    import pydantic

    from ...calibrate.available import require_available
    from ...calibrate.data import CalibrationSpec
    from ...errors import brief

    if source is None:
        return None
    try:
        spec = CalibrationSpec(source=source, samples=samples, length=length, seed=seed, held_out=held_out)
    except pydantic.ValidationError as error:
        said = error.errors(include_url=False, include_input=False)[0]["msg"].removeprefix("Value error, ")
        raise RequestError(f"--calibration {brief(source)}: {said}") from None
    if spec.self_written(samples):
        raise RequestError("--calibration self is text that the model writes, which this command does not do.", "Take pydoc.")
    require_available(spec)
    return spec


def _require_map(shown: str, calibration: str | None) -> None:
    known = ("energy-0.2", "energy-0.4", "energy-0.6", "rank", "largest", "kurtosis", "input", "none")
    if shown not in known:
        raise RequestError(f"--map '{shown}' is nothing that was measured.", did_you_mean(shown, known))
    if shown == "input" and calibration is None:
        raise RequestError("--map input needs inputs, and there is no --calibration.", "Add --calibration pydoc.")


def _require_page(file: Path | None) -> None:
    if file is not None:
        require_writable(file, "--html")
