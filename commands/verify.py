"""`lrc verify`: check a compressed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import together
from .common.arguments import quiet
from .common.json_output import Json, answered, require_json
from .common.options import Trust


def verify(
    folder: Annotated[Path, typer.Argument(help="The --out folder of a finished lrc compress.")],
    trust_remote_code: Trust = False,
    edited_card: Annotated[
        bool, typer.Option("--edited-card", help="The model card (README.md) was edited on purpose: leave it out.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Check that a compressed checkpoint is whole.

    Checks the hashes of the files, the shapes of the tensors, that no other file lies there which loading would read, and that
    the model gives finite logits.
    """
    from ..checkpoint.folder import clear_finished, require_result
    from .common.console import messages, plain_or_terminal

    with together() as check:
        check(require_json, json_file)
        check(require_result, folder)
    quiet()
    from ..run import verify as checks

    for name in clear_finished(folder):
        messages().print(f"note: {folder / name} was left by a run that was killed at its end; deleted.")
    record = checks.verify(folder, trust_remote_code=trust_remote_code, edited_card=edited_card)
    held = record["bytes"]
    notes = checks.not_covered(folder, record)
    if answered(
        json_file, {"folder": str(folder), "whole": True, "shards": len(record["shards"]), "bytes": held, "notes": notes}
    ):
        return
    console = plain_or_terminal()
    console.print(
        f"{folder}: whole. {len(record['shards'])} shards, {held['model_after']:,} of {held['model_before']:,} bytes, "
        "logits finite."
    )
    for note in notes:
        console.print(f"note: {note}.")
