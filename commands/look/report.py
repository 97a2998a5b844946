"""`lrc report`: a finished result as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import together
from ..common.arguments import require_place
from ..common.json_output import Json, answered, require_json


def report(
    result: Annotated[Path, typer.Argument(help="The --out folder of a finished lrc compress.")],
    out: Annotated[
        Path | None, typer.Option(show_default="RESULT-report", help="A folder for report.html and report.json.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="A file of lrc eval --json, whose values the page shows. Several are allowed."),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Write each figure as a PNG file, too (needs matplotlib).")] = False,
    json_file: Json = None,
) -> None:
    """Show a finished result as one page: sizes, bits and ranks by layer, errors, values, recipe.

    Writes report.html, which needs no network, and report.json with the same numbers.
    """
    from ...checkpoint.atomic import write_text, writing
    from ...checkpoint.folder import require_result
    from ...report.content import gather, require_evaluation
    from ...report.figures import figures
    from ...report.page import page
    from ...report.picture import draw, require_pictures
    from ...run.result import Result

    folder = out or result.absolute().with_name(f"{result.absolute().name}-report")
    with together() as check:
        check(require_result, result)
        check(require_place, folder, "--out")
        check(require_json, json_file)
        for file in evaluation or []:
            check(require_evaluation, file)
        if png:
            check(require_pictures)
    content = gather(Result.read(result), evaluation or [])
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", content.as_json())
    write_text(folder / "report.html", page(content))
    if png:
        for figure in figures(content):
            draw(figure, folder / f"{figure.name}.png")
    if not answered(json_file, content.as_data()):
        print(folder / "report.html")
