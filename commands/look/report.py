"""`lrc report`: a finished result as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    result: Annotated[Path, typer.Argument(help="The --out folder of a finished lrc compress.")],
    out: Annotated[
        Path | None, typer.Option(show_default="RESULT-report", help="A folder for report.html and report.json.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="A file of lrc eval --json, whose values the page shows. Several are allowed."),
    ] = None,
) -> None:
    """Show a finished result as one page: sizes, bits and ranks by layer, errors, values, recipe.

    Writes report.html, which needs no network, and report.json with the same numbers.
    """
    from ...checkpoint.atomic import write_text, writing
    from ...checkpoint.opening import require_finished
    from ...report.content import gather
    from ...report.page import page
    from ...run.result import Result

    require_finished(str(result))
    content = gather(Result.read(result), evaluation or [])
    folder = out or result.absolute().with_name(f"{result.absolute().name}-report")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", content.as_json())
    write_text(folder / "report.html", page(content))
    print(folder / "report.html")
