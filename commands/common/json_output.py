"""The answer of a command as JSON, to a file or to the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import require_writable

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", show_default="not written", help="Write the answer to this file; - for the output."),
]
STDOUT = "-"


def require_json(target: str | None) -> None:
    """Refuse a file that could not be written at the end.

    Raises:
        RequestError: its folder is not there, or it is a folder itself.
        OutputError: it may not be written.
    """
    if target is not None and target != STDOUT:
        require_writable(Path(target))


def answered(target: str | None, answer: Any) -> bool:
    """Write the answer where it is asked for; whether that was the output, where nothing else may be printed then."""
    if target is None:
        return False
    text = json.dumps(answer, indent=2, default=str) + "\n"
    if target == STDOUT:
        print(text, end="")
        return True
    Path(target).write_text(text, encoding="utf-8")
    return False
