"""Where it is printed: results on the output, messages on the error stream; plain where there is no terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def plain_or_terminal(stderr: bool = False) -> Console:
    """A console that prints brackets and colons of names as they are, and wraps no line where there is no terminal."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=stderr)
    if console.is_terminal:
        console.soft_wrap = False  # lines break between words
    else:
        console.width = 10_000
    return console


def messages() -> Console:
    """The same console on the error stream, for what is said about the work while the results go to the output."""
    return plain_or_terminal(stderr=True)


def bar_of(console: Console) -> Progress:
    """A bar with what is done, elapsed and left; it shows itself on a terminal alone, and is gone when it stops."""
    # not at the top: a message about a mistake need not wait for it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("elapsed"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def advance(bar: Progress, task: TaskID, stage: str, done: int, total: int) -> None:
    """Show that `done` of `total` steps of a stage are finished; another stage has an estimate of its own for what is left."""
    shown = bar.tasks[task]
    if done < shown.completed or total != shown.total:
        begun = shown.start_time
        bar.reset(task)
        shown.start_time = begun  # elapsed is the time of all stages
    bar.update(task, description=stage, completed=done, total=total)
