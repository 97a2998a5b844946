"""`lrc compare`: sizes, forms, perplexities, and how far predictions differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import RequestError, together
from ..common.arguments import interruptible, quiet
from ..common.json_output import Json, answered, require_json
from ..common.options import Trust
from .generate import Dtype


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Two models or more; the first one is what others are compared with."),
    ],
    text: Annotated[Path | None, typer.Option(show_default="pydoc-topics", help="A file of text to measure on.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="How many windows of the text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens in each window.")] = 256,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, or auto.")] = "cpu",
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json_file: Json = None,
) -> None:
    """Compare models: sizes, forms, perplexity, and divergence from the first.

    The divergence is KL(first ‖ other) in nats per token; it needs no calibration and sees what perplexity averages away.
    """
    if len(models) < 2:
        raise RequestError("There is one model, and nothing to compare it with.", "Name two or more.")
    from ...calibrate.data import evaluation_text
    from ...checkpoint.opening import devices_of, dtype_of, located

    with together() as check:
        check(require_json, json_file)
        number = check(dtype_of, dtype)
        check(devices_of, device)
        read = check(evaluation_text, "pydoc-topics" if text is None else f"text:{text}")
        for location in [check(located, name) for name in models]:
            if location is not None:
                check(location.require_tokenizer)
    quiet()
    from ...evaluation.side_by_side import HowToOpen, compared

    with interruptible("nothing was written"):
        rows = compared(models, read, windows, length, HowToOpen(number, device.strip(), trust_remote_code))
    if answered(json_file, {"text": read.protocol, "windows": windows, "length": length, "models": rows}):
        return
    from rich.table import Table

    from ...plan.budget import readable
    from ..common.console import plain_or_terminal

    console, table = plain_or_terminal(), Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for column in ("bytes", "of the first", "perplexity", "divergence"):
        table.add_column(column, justify="right")
    table.add_column("forms", overflow="fold")
    for row in rows:
        far = "not comparable" if row["divergence"] is None else f"{row['divergence']:.4f}"
        forms = ", ".join(f"{count} {form}" for form, count in row["forms"].items()) or "as it came"
        table.add_row(
            row["model"], readable(row["bytes"]), f"{row['bytes'] / rows[0]['bytes']:.1%}", f"{row['perplexity']:.3f}",
            "" if row is rows[0] else far, forms,
        )  # fmt: skip
    console.print(table, soft_wrap=True)
    console.print(f"{read.protocol}: the first {windows} windows of {length} tokens; divergence in nats per token")
