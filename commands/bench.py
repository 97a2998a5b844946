"""`lrc bench`: how fast a model answers, beside a baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import together
from .common.arguments import counts_of, quiet, require_writable
from .common.options import Trust


def bench(
    model: Annotated[str, typer.Argument(help="The --out folder of a finished lrc compress, or any model that lrc reads.")],
    baseline: Annotated[
        str | None, typer.Option(show_default="none", help="Another model, measured in turns with the first: the original.")
    ] = None,
    prefill: Annotated[str, typer.Option(help="Lengths of prompts, in tokens, separated by commas.")] = "512,2048",
    decode: Annotated[str, typer.Option(help="Batch sizes of decoding, separated by commas.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="How often each workload is repeated; the median counts.")] = 5,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(show_default="the first model's", help="Dtype of both: float32, bfloat16 or float16.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", show_default="not written", help="File for all figures.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure how fast a model answers.

    Measures loading, memory, prefill, and decoding with a cache. With --baseline both models are in memory and take turns, so
    that the ratios hold on a busy machine too.
    """
    from ..checkpoint.opening import devices_of, dtype_of, located
    from ..evaluation.speed import SpeedSettings, measure_speed
    from .common.terminal import print_speed

    names = [model] if baseline is None else [model, baseline]
    with together() as check:
        lengths, batches = check(counts_of, prefill, "--prefill"), check(counts_of, decode, "--decode")
        chosen = check(dtype_of, dtype)
        check(devices_of, device)
        if json_file is not None:
            check(require_writable, json_file)
        for name in names:
            check(located, name)
    quiet()
    settings = SpeedSettings(lengths, batches, rounds)
    report = measure_speed(names, settings, chosen, device, trust_remote_code)
    print_speed(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_json(), indent=2) + "\n")
