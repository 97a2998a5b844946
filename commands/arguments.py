"""Checks of what is given on the command line: models, dtypes, devices, files and lists of names.

torch and transformers are imported where they are needed, so that `lrc --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ..errors import LrcError, OutputError, RequestError, did_you_mean


@contextmanager
def together() -> Iterator[Callable[..., Any]]:
    """Run independent checks of one request, so that all its mistakes are raised together when the context ends.

    Gives a function `check(function, *arguments)`: the function's result, or None where it found a mistake.

    Raises:
        LrcError: the one mistake.
        RequestError: several mistakes, with all their messages.
    """
    errors: list[LrcError] = []

    def check(function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function, and keep the mistake that it finds for later."""
        try:
            return function(*arguments)
        except LrcError as error:
            errors.append(error)
            return None

    yield check
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise RequestError("\n".join(map(str, errors)))


@contextmanager
def interruptible(what_now: str) -> Iterator[None]:
    """Where Ctrl-C ends the work, print one line that says how to go on, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"lrc: interrupted; {what_now}.", file=sys.stderr)
        raise typer.Exit(130) from None


def located(name: str) -> Any:
    """The location of a model.

    Raises:
        RequestError: it is the folder of an interrupted run.
        ModelError: there is no such model.
    """
    from ..checkpoint.location import locate

    require_finished(name)
    return locate(name)


def require_finished(name: str) -> None:
    """Refuse the folder of an interrupted run."""
    from ..checkpoint.artifact import JOURNAL

    if (Path(name) / JOURNAL).is_file() and not (Path(name) / "config.json").is_file():
        raise RequestError(f"{name} holds an interrupted run.", "The `lrc compress` command that began it continues it.")


def require_writable(file: Path) -> None:
    """Refuse a file that could not be written at the end of hours of work.

    Raises:
        RequestError: its folder is not there, or it is a folder itself.
        OutputError: it may not be written.
    """
    if not file.parent.is_dir():
        raise RequestError(f"The folder of --json {file} does not exist.", "Create it first.")
    if file.is_dir():
        raise RequestError(f"--json {file} is a folder.", "Name a file in it.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"Cannot write --json {file}: permission denied, or a read-only disk.", "Give another file.")


def require_folder(folder: Path) -> None:
    """Make a folder if it does not exist.

    Raises:
        OutputError: it cannot be made.
    """
    from ..checkpoint.atomic import writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def dtype_of(name: str | None) -> Any:
    """The dtype of a name; None of None."""
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise RequestError(f"'{name}' is no dtype of a checkpoint.", did_you_mean(name, known))
    return known[name] if name else None


def devices_of(text: str) -> list[Any]:
    """The devices of a list such as cuda:0,cuda:1, or of auto."""
    import torch

    count = torch.cuda.device_count()
    if text.strip() == "auto":
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    devices = []
    for part in text.split(","):
        try:
            device = torch.device(part.strip())
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise RequestError(f"'{part}' is no device for lrc.", "Write cpu, cuda, cuda:1, cuda:0,cuda:1 or auto.")
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            if device.index >= count:
                raise RequestError(f"There is no device {part}: torch sees {count} GPUs here.", "Write cpu or auto.")
        if device in devices or (device.type == "cpu" and len(text.split(",")) > 1):
            raise RequestError(f"--device {text} spreads work over one device twice, or over the CPU and others.",
                               "Name GPUs, each once.")  # fmt: skip
        devices.append(device)
    return devices


def names_of(text: str, option: str = "--tasks") -> list[str]:
    """The names in a list with commas.

    Raises:
        RequestError: there is none.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise RequestError(f"{option} is empty.", "Name at least one, such as --tasks wikitext2 or --recipes svd-llm.")
    return names


def quiet() -> None:
    """Silence transformers: its progress bars and notices would break those of lrc."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def ratio_of(text: str) -> float:
    """A ratio of a sweep as a number."""
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"'{text}' is no ratio.", "Write --ratios 0.2,0.4.") from None


def require_calibration_fits(view: Any, plan: Any) -> None:
    """Refuse samples that are longer than the model's positions, before anything is written to --out."""
    from ..model.view import require_positions

    if plan.recipe.reads_text:
        require_positions(view.config, plan.recipe.calibration.length, "calibration.length")
