"""Checks of what is given on the command line: models, dtypes, devices, files and lists of names.

torch and transformers are imported where they are needed, so that `lrc --help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from ...errors import OutputError, RequestError


@contextmanager
def interruptible(what_now: str) -> Iterator[None]:
    """Where Ctrl-C ends the work, print one line that says how to go on, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        from .console import messages

        messages().print(f"lrc: interrupted; {what_now}.")
        raise typer.Exit(130) from None


def require_writable(file: Path, option: str = "--json") -> None:
    """Refuse a file that could not be written at the end of hours of work.

    Raises:
        RequestError: its folder is not there, or it is a folder itself.
        OutputError: it may not be written.
    """
    if not file.parent.is_dir():
        raise RequestError(f"The folder of {option} {file} does not exist.", "Create it first.")
    if file.is_dir():
        raise RequestError(f"{option} {file} is a folder.", "Name a file in it.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"Cannot write {option} {file}: permission denied, or a read-only disk.", "Give another file.")


def require_place(folder: Path, option: str) -> None:
    """Refuse, without making it, a folder that cannot be made or written to.

    Raises:
        OutputError: it or a folder above it is a file, or may not be written to.
    """
    standing = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        raise OutputError(
            f"Cannot write {folder}: {standing} {'may not be written to' if standing.is_dir() else 'is not a folder'}.",
            f"Give another {option}.",
        )


def require_own(folder: Path) -> None:
    """Refuse, without making it, a folder for a sweep that cannot be made or holds other things.

    Raises:
        OutputError: it is a file, or it may not be written to.
        RequestError: it holds files, and none of a sweep's.
    """
    require_place(folder, "--out")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {"sweep.json", "statistics", ".lrc.lock"}:
        raise RequestError(
            f"{folder} holds other files ({', '.join(sorted(names)[:3])}); a sweep would mix its own with them.",
            "Give an empty or new folder as --out.",
        )


def names_of(text: str, option: str = "--tasks") -> list[str]:
    """The names in a list with commas.

    Raises:
        RequestError: there is none.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        such = {"--tasks": "wikitext2", "--recipes": "svd-llm", "--ratios": "0.2"}.get(option, "NAME")
        raise RequestError(f"{option} is empty.", f"Name at least one, such as {option} {such}.")
    return names


def counts_of(text: str, option: str) -> list[int]:
    """The numbers of an option's comma-separated list, each 1 or more.

    Raises:
        RequestError: the text is something else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise RequestError(f"{option} '{text}' is no list of numbers.", f"Write numbers of 1 or more, such as {option} 1,8.")
    return [int(part) for part in parts]


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
