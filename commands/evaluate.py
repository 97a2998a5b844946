"""`lrc eval`: measure a model, and a baseline beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import together
from .common.arguments import interruptible, names_of, quiet, require_writable
from .common.options import Activations, ModelOptions, grouped

if TYPE_CHECKING:
    from ..evaluation.request import Request


@dataclass(frozen=True)
class EvalOptions:
    """What is measured, and how."""

    tasks: Annotated[
        str | None,
        typer.Option(
            show_default="pydoc-topics, wikitext2",
            help="What to measure, separated by commas: wikitext2, ptb, c4, pydoc-topics, text:PATH, or any task of lm-eval.",
        ),
    ] = None
    length: Annotated[
        int | None, typer.Option(show_default="2048, or the model's positions", help="Tokens in each perplexity window.")
    ] = None
    max_windows: Annotated[int | None, typer.Option(show_default="all", help="Use only the first N windows of each text.")] = (
        None
    )
    limit: Annotated[
        float | None,
        typer.Option(show_default="all", help="lm-eval: use only the first N documents of each task; below 1, a fraction."),
    ] = None
    num_fewshot: Annotated[
        int | None, typer.Option(show_default="the task's", help="lm-eval: number of examples in the prompt.")
    ] = None
    batch_size: Annotated[int, typer.Option(help="Windows, or lm-eval requests, in each forward pass.")] = 1
    bos: Annotated[
        str, typer.Option(help="Put BOS before each window: auto (if the tokenizer puts it before texts), always or never.")
    ] = "auto"
    include_path: Annotated[Path | None, typer.Option(help="lm-eval: folder with task files of your own.")] = None
    activations: Activations = None
    baseline: Annotated[str | None, typer.Option(help="Another model to measure and compare with.")] = None
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None
    allow_calibration_text: Annotated[
        bool, typer.Option("--allow-calibration-text", help="Measure even on text of the model's calibration set.")
    ] = False


@grouped
def evaluate(options: EvalOptions, source: ModelOptions) -> None:
    """Measure perplexity, or any task of lm-eval.

    The model may be compressed or not.
    """
    from ..checkpoint.hf_quantizer import open_model
    from ..checkpoint.opening import devices_of, dtype_of, located
    from ..evaluation.evaluate import check_model, longest_window, measure
    from ..evaluation.request import LENGTH
    from ..evaluation.results import Evaluation
    from .common.eval_output import reporting

    quiet()
    models = [source.model] if options.baseline is None else [source.model, options.baseline]
    with together() as check:
        if options.json_file is not None:
            check(require_writable, options.json_file)
        locations = [check(located, name) for name in models]
        for location in locations:
            if location is not None:
                check(location.require_tokenizer)
        dtype = check(dtype_of, source.dtype)
        check(devices_of, source.device)
        length = options.length
        if length is None and None not in locations:
            length = check(longest_window, locations, source.trust_remote_code)
        request = check(_prepared, options, length or LENGTH)
    how = (source.trust_remote_code, dtype, source.device.strip())
    provenance = [check_model(request, location, *how) for location in locations]
    evaluations = [Evaluation(name) for name in models]
    with interruptible("what was measured is above"), reporting(evaluations, options.json_file):
        for evaluation, seen in zip(evaluations, provenance, strict=True):
            # no name holds the loaded model here: the next one is loaded when this one's memory is free
            measure(
                *open_model(
                    evaluation.model, dtype=dtype, device=source.device.strip(), trust_remote_code=source.trust_remote_code
                ),
                request,
                calibration_provenance=seen,
                done=evaluation.results.append,
            )


def _prepared(options: EvalOptions, length: int) -> Request:
    from ..evaluation.request import QUICK_WINDOWS, Settings, prepare, usual_texts
    from .common.console import messages

    texts, windows = None, options.max_windows
    if options.tasks is None:
        texts, said = usual_texts()
        windows = windows or QUICK_WINDOWS
        messages().print(f"No --tasks: perplexity on the first {windows} windows of {length} tokens of {said}.")
    return prepare(
        Settings(
            list(texts or names_of(options.tasks or "")),
            length=length,
            bos=options.bos,
            max_windows=windows,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            include_path=options.include_path,
            activations=options.activations,
            allow_calibration_text=options.allow_calibration_text,
        ),
        texts,
    )
