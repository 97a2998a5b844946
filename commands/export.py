"""`lrc export`: write a finished result in a format that other tools open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import together
from .common.arguments import quiet, require_place
from .common.json_output import Json, answered, require_json
from .common.options import MaxShardSize, Trust


def export(
    result: Annotated[Path, typer.Argument(help="The --out folder of a finished lrc compress.")],
    to: Annotated[str | None, typer.Option(help="The format; without it, all formats are listed.")] = None,
    out: Annotated[Path | None, typer.Option(show_default="RESULT-FORMAT", help="A new folder for the export.")] = None,
    dtype: Annotated[
        str | None, typer.Option(show_default="the result's", help="Dtype of the export: float32, bfloat16 or float16.")
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    check: Annotated[bool, typer.Option(help="Compare the logits of the export with those of the result.")] = True,
    trust_remote_code: Trust = False,
    json_file: Json = None,
) -> None:
    """Write a finished result in a format that other tools open.

    Says what the format loses, and checks the export by its logits before it gets its name.
    """
    from ..checkpoint.folder import require_result
    from ..checkpoint.opening import dtype_of
    from ..export.base import formats, get_format
    from ..run.request import shard_bytes
    from .common.console import plain_or_terminal

    with together() as checking:
        checking(require_json, json_file)
        checking(require_result, result)
        most = checking(shard_bytes, max_shard_size)
        number = checking(dtype_of, dtype)
        if to is not None:
            checking(get_format, to)
            checking(require_place, out or result.absolute().with_name(f"{result.absolute().name}-{to}"), "--out")
    quiet()
    console = plain_or_terminal()
    if to is None:
        listed = {form.name: {"about": form.about, "opened_by": form.opened_by} for form in formats().values()}
        if answered(json_file, listed):
            return
        for form in formats().values():
            console.print(f"{form.name}: {form.about}; opened by {form.opened_by}")
        return
    from ..export.write import export as written

    done = written(
        result,
        to,
        out=out,
        dtype=number,
        max_shard_bytes=most,
        check=check,
        trust_remote_code=trust_remote_code,
    )
    answer = {"folder": str(done.folder), "format": done.format, "bytes": done.nbytes, "difference": done.difference}
    if answered(json_file, answer | {"lost": list(done.lost)}):
        return
    for sentence in done.lost:
        console.print(f"note: {sentence}")
    checked = "not checked" if done.difference is None else f"logits within {done.difference:.2g} of the result's"
    console.print(f"{done.folder}: {done.format}, {done.nbytes:,} bytes, {checked}.")
