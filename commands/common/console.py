"""Where it is printed: results on the output, messages on the error stream; plain where there is no terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("elapsed"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
