"""Options that several commands of the command line have alike."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or pkg:PACKAGE/FILE.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:0,cuda:1 (the work is spread over them), or auto.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the checkpoint run.")]
Recipe = Annotated[str, typer.Option(help="A shipped recipe (lrc recipe list) or a YAML file.")]
Ratio = Annotated[float | None, typer.Option(help="Fraction of the compressed matrices' bytes to remove, 0 to below 1.")]
Bits = Annotated[float | None, typer.Option(help="In place of --ratio: mean bits per compressed weight, everything counted.")]
Rise = Annotated[
    str | None, typer.Option(help="In place of --ratio: how far perplexity on held-out calibration text may rise, such as 5%.")
]
Size = Annotated[str | None, typer.Option(help="In place of --ratio: of the files with the weights, such as 300MB or 1.5GiB.")]
Calibrate = Annotated[
    str | None, typer.Option("--calibration", help="wikitext2, c4, text:PATH, jsonl:PATH, pydoc, self, a*0.5+b*0.5 …")
]
Samples = Annotated[int | None, typer.Option(help="Calibration samples.")]
Length = Annotated[int | None, typer.Option(help="Tokens in each calibration sample.")]
Seed = Annotated[int | None, typer.Option(help="Seed of calibration samples and sampled labels.")]
Propagate = Annotated[str | None, typer.Option(help="original (one-shot) or compressed (sequential).")]
Activations = Annotated[
    str | None, typer.Option(help="int8 or mxint8: round what the layers' matrices read (of the original or baseline, too).")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the recipe; dotted; repeatable; flags win."),
]
