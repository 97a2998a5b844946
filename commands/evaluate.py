"""`lrc eval`: measure a model, and a baseline beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .arguments import interruptible, names_of, quiet, require_writable, together
from .options import Activations, ModelOptions, grouped


@dataclass(frozen=True)
class EvalOptions:
    """What is measured, and how."""

    tasks: Annotated[str, typer.Option(help="wikitext2, ptb, c4, text:PATH, or any lm-eval task; comma-separated.")]
    length: Annotated[int, typer.Option(help="Tokens in each perplexity window.")] = 2048
    max_windows: Annotated[int | None, typer.Option(help="Only the first N windows.")] = None
    limit: Annotated[float | None, typer.Option(help="lm-eval: only the first N documents (or a fraction).")] = None
    num_fewshot: Annotated[int | None, typer.Option(help="lm-eval: examples in the prompt.")] = None
    batch_size: Annotated[int, typer.Option(help="Windows or requests at a time.")] = 1
    bos: Annotated[str, typer.Option(help="BOS before each window: auto, always or never.")] = "auto"
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval task files of your own.")] = None
    activations: Activations = None
    baseline: Annotated[str | None, typer.Option(help="Another model to put beside it.")] = None
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None
    allow_calibration_text: Annotated[
        bool, typer.Option("--allow-calibration-text", help="Evaluate even on the text that calibration saw.")
    ] = False


@grouped
def evaluate(options: EvalOptions, source: ModelOptions) -> None:
    """Measure a model or a compressed checkpoint: token perplexity, or any task of lm-eval."""
    from ..checkpoint.artifact import RECORD, read_record
    from ..checkpoint.hf_quantizer import open_model
    from ..checkpoint.opening import devices_of, dtype_of, located
    from ..evaluation.evaluate import measure, refuse_calibration_text
    from ..evaluation.request import check_positions, prepare
    from .eval_output import reporting

    if options.json_file is not None:
        require_writable(options.json_file)
    quiet()
    models = [source.model, *([options.baseline] if options.baseline is not None else [])]
    with together() as check:
        request = check(
            lambda: prepare(
                names_of(options.tasks), length=options.length, bos=options.bos, max_windows=options.max_windows,
                limit=options.limit, num_fewshot=options.num_fewshot, batch_size=options.batch_size,
                include_path=options.include_path, activations=options.activations,
            )
        )  # fmt: skip
        locations = [check(located, name) for name in models]
        dtype = check(dtype_of, source.dtype)
        check(devices_of, source.device)
    if request.texts:
        for location in locations:
            check_positions(location.config(source.trust_remote_code), options.length)
    seen = [read_record(Path(name))["calibration"]["provenance"] if (Path(name) / RECORD).is_file() else [] for name in models]
    for name, provenance in zip(models, seen, strict=True):
        if not options.allow_calibration_text:
            refuse_calibration_text(request, provenance, name)
    with interruptible("what was measured is above"), reporting(models, options.json_file) as measured:
        for name, provenance, results in zip(models, seen, measured, strict=True):
            measure(
                *open_model(name, dtype=dtype, device=source.device.strip(), trust_remote_code=source.trust_remote_code),
                request, calibration_provenance=provenance,
                allow_calibration_text=options.allow_calibration_text, done=results.append,
            )  # fmt: skip
