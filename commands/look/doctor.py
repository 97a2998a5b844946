"""`lrc doctor`: what this machine offers, and what to do where something is missing."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..common.json_output import Json, answered, require_json


def doctor(
    folder: Annotated[Path, typer.Option(help="Where results would be written.")] = Path(),
    json_file: Json = None,
) -> None:
    """Look at versions, devices, memory, disks and the hub, with remedies."""
    require_json(json_file)
    from rich.table import Table

    from ...model.machine.health import examined
    from ..common.console import plain_or_terminal

    findings = examined(folder)
    if answered(json_file, [asdict(finding) for finding in findings]):
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        table.add_row(f"{'!' if finding.remedy else ' '} {finding.topic}", finding.found)
        if finding.remedy:
            table.add_row("", f"→ {finding.remedy}")
    plain_or_terminal().print(table)
