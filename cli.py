"""The command line: parses, calls, prints. No mathematics.

torch and transformers are imported inside the commands, so that `lrc --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands.arguments import (
    calibration_overrides,
    checked,
    devices_of,
    dtype_of,
    located,
    names_of,
    quiet,
    require_calibration_fits,
    require_finished,
    require_writable,
)
from .commands.options import (
    Activations,
    Bits,
    Calibrate,
    Device,
    Dtype,
    Length,
    Model,
    Propagate,
    Ratio,
    Recipe,
    Rise,
    Samples,
    Seed,
    Set,
    Size,
    Trust,
)
from .commands.recipe import recipe_app
from .commands.sweep import sweep
from .errors import CalibrationError, LrcError

if TYPE_CHECKING:
    from .plan.plan import Draft
    from .run.request import Request

app = typer.Typer(
    help="Compress language models after training, and measure what that costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(recipe_app, name="recipe")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from . import __version__

        print(f"lrc {__version__}")
        raise typer.Exit


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for the result; the same command continues an interrupted run in it.")],
    recipe: Recipe = "lrc-fast",
    ratio: Ratio = None,
    bits: Bits = None,
    size: Size = None,
    max_ppl_increase: Rise = None,
    calibration: Calibrate = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    propagate: Propagate = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    set_: Set = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete an earlier run in --out and start over.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    statistics: Annotated[
        Path | None, typer.Option(help="Folder that keeps the original model's statistics for other recipes.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compress a model: calibrate, factorize every matrix, write a smaller checkpoint."""
    from .commands.terminal import Progress, print_plan
    from .run.pipeline import run_request

    amounts = {"ratio": ratio, "bits": bits, "size": size, "max_ppl_increase": max_ppl_increase}
    overrides = amounts | calibration_overrides(propagate, calibration, samples, length, seed)
    request = _requested(model, recipe, overrides, set_ or [], device, dtype, trust_remote_code, out)
    if dry_run:
        view, draft = _drafted(request)
        print_plan(draft)
        _note_calibration(view, draft)
        return
    with interruptible("the same command continues"), Progress() as progress:
        result = run_request(request, out, statistics, restart, progress)
    if not result.made:
        print(f"{out} holds this very result already; nothing to do (--restart makes it anew).")
        return
    progress.finish(out)


@app.command()
def plan(
    model: Model,
    recipe: Recipe = "lrc-fast",
    ratio: Ratio = None,
    bits: Bits = None,
    size: Size = None,
    max_ppl_increase: Rise = None,
    calibration: Calibrate = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    propagate: Propagate = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    set_: Set = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every target and everything that is kept.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Print what `lrc compress` would do; reads headers, and one layer's weights where sub-layers may go."""
    from .commands.terminal import print_plan

    amounts = {"ratio": ratio, "bits": bits, "size": size, "max_ppl_increase": max_ppl_increase}
    overrides = amounts | calibration_overrides(propagate, calibration, samples, length, seed)
    view, draft = _drafted(_requested(model, recipe, overrides, set_ or [], device, dtype, trust_remote_code))
    print_plan(draft, verbose=verbose)
    _note_calibration(view, draft)


@app.command("eval")
def evaluate_command(
    model: Model,
    tasks: Annotated[str, typer.Option(help="wikitext2, ptb, c4, text:PATH, or any lm-eval task; comma-separated.")],
    length: Annotated[int, typer.Option(help="Tokens in each perplexity window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Only the first N windows.")] = None,
    limit: Annotated[float | None, typer.Option(help="lm-eval: only the first N documents (or a fraction).")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="lm-eval: examples in the prompt.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows or requests at a time.")] = 1,
    bos: Annotated[str, typer.Option(help="BOS before each window: auto, always or never.")] = "auto",
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval task files of your own.")] = None,
    activations: Activations = None,
    baseline: Annotated[str | None, typer.Option(help="Another model to put beside it.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    allow_calibration_text: Annotated[
        bool, typer.Option("--allow-calibration-text", help="Evaluate even on the text that calibration saw.")
    ] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a model or a compressed checkpoint: token perplexity, or any task of lm-eval."""
    from .checkpoint.artifact import RECORD, read_record
    from .checkpoint.hf_quantizer import open_model
    from .commands.eval_output import reporting
    from .evaluation.evaluate import measure, refuse_calibration_text
    from .evaluation.request import check_positions, prepare

    if json_file is not None:
        require_writable(json_file)
    quiet()
    models = [model, *([baseline] if baseline is not None else [])]
    request, *found = checked(
        lambda: prepare(
            names_of(tasks), length=length, bos=bos, max_windows=max_windows, limit=limit, num_fewshot=num_fewshot,
            batch_size=batch_size, include_path=include_path, activations=activations,
        ),
        *(partial(located, name) for name in models),
        lambda: dtype_of(dtype),
        lambda: devices_of(device),
    )  # fmt: skip
    if request.texts:
        for location in found[: len(models)]:
            check_positions(location.config(trust_remote_code), length)
    seen = [read_record(Path(name))["calibration"]["provenance"] if (Path(name) / RECORD).is_file() else [] for name in models]
    for name, provenance in zip(models, seen, strict=True):
        if not allow_calibration_text:
            refuse_calibration_text(request, provenance, name)
    with interruptible("what was measured is above"), reporting(models, json_file) as measured:
        for name, provenance, results in zip(models, seen, measured, strict=True):
            measure(
                *open_model(name, dtype=dtype_of(dtype), device=device.strip(), trust_remote_code=trust_remote_code), request,
                calibration_provenance=provenance, allow_calibration_text=allow_calibration_text, done=results.append,
            )  # fmt: skip


app.command()(sweep)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="The --out folder of a finished `lrc compress`.")],
    trust_remote_code: Trust = False,
) -> None:
    """Check a compressed checkpoint: hashes, shapes, and that it runs."""
    from .run.verify import verify as check

    quiet()
    require_finished(str(folder))
    record = check(folder, trust_remote_code=trust_remote_code)
    held = record["bytes"]
    print(
        f"{folder}: whole. {len(record['shards'])} shards, {held['model_after']:,} of {held['model_before']:,} bytes, "
        "logits finite."
    )


def _note_calibration(view: Any, plan: Draft) -> None:
    """Say with a plan what would be refused."""
    try:
        require_calibration_fits(view, plan)
    except CalibrationError as error:
        print(f"note: {error.what} {error.remedy}")


@contextmanager
def interruptible(what_now: str) -> Iterator[None]:
    """Ctrl-C ends in a line that says what comes of it."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"lrc: interrupted; {what_now}.", file=sys.stderr)
        raise typer.Exit(130) from None


def _requested(
    model: str, recipe: str, overrides: dict[str, Any], settings: list[str], device: str, dtype: str | None, trust: bool,
    out: Path | None = None,
) -> Request:  # fmt: skip
    """Check the request, the cheapest part first."""
    from .checkpoint.artifact import require_usable
    from .plan.load_recipe import load_recipe
    from .run.request import Request

    wanted, number, devices, *_ = checked(
        lambda: load_recipe(recipe, overrides, settings),
        lambda: dtype_of(dtype),
        lambda: devices_of(device),
        *([partial(require_usable, out)] if out else []),
    )
    quiet()
    return Request(located(model), wanted, tuple(devices), number, trust)


def _drafted(request: Request) -> tuple[Any, Draft]:
    from .plan.planner import make_draft

    view = request.view()
    return view, make_draft(view, request.recipe, len(request.devices))


def main(words: list[str] | None = None) -> None:
    """Run a command line, by default this process's own; a mistake ends in a message and an exit code, a bug in a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        # the name also where it runs as python -m lrc.cli; the object for commands that run others in processes of their own
        app(words, prog_name="lrc", obj=main)
    except LrcError as error:
        print(f"lrc: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
