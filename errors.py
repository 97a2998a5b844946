"""The errors that a user can fix.

Each class is one situation. A message says what happened, with the numbers, and what to do about it. The command line prints it
without a traceback and exits with `exit_code` (2: the request was wrong, 1: the run failed). Any other exception is a bug and
is shown with its traceback.
"""

from __future__ import annotations

import difflib
import errno
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class LrcError(Exception):
    """A situation that the user can fix.

    Args:
        what: what happened, with names and numbers.
        remedy: what to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n{self.remedy}" if self.remedy else self.what


class RequestError(LrcError):
    """The request cannot be carried out as written (a flag, a value, a combination)."""

    exit_code = 2


class RecipeError(RequestError):
    """One or several mistakes in a recipe; all of them are listed."""

    def __init__(self, where: str, problems: Iterable[str], remedy: str = "") -> None:
        self.problems = list(problems)
        count = len(self.problems)
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{where}: {count} problem{'s' if count != 1 else ''}\n{listed}", remedy)


class ModelError(RequestError):
    """The model cannot be found, read or understood."""


class CalibrationError(RequestError):
    """The calibration or evaluation text is not available, or too short."""


class BudgetError(RequestError):
    """The budget cannot be met."""


class ResumeError(RequestError):
    """The output folder holds a run of another request."""

    def __init__(self, where: str, differences: Iterable[str]) -> None:
        self.differences = list(differences)
        listed = "\n".join(f"  - {difference}" for difference in self.differences)
        super().__init__(
            f"{where} holds an unfinished or finished run of something else:\n{listed}",
            "Give another --out, ask for the same as before, or start over with --restart (it deletes that run).",
        )


class CheckpointError(LrcError):
    """A file of a checkpoint is missing, truncated, corrupt or inconsistent."""


class NonFiniteError(LrcError):
    """A NaN or an infinity in weights, activations, statistics or logits."""


class OutputError(LrcError):
    """The result cannot be written: no space, no permission, or not a folder."""


class ResourceError(LrcError):
    """The machine, or a limit that was set for the process, gave no more memory."""


class EvaluationError(LrcError):
    """An evaluation did not give a number that can be trusted."""


class SweepError(LrcError):
    """Rows of a sweep failed; the others are finished and kept."""

    def __init__(self, failures: Mapping[str, str]) -> None:
        self.failures = dict(failures)
        listed = "\n".join(f"  - {name}: {text}" for name, text in self.failures.items())
        super().__init__(
            f"Rows that failed: {len(self.failures)}.\n{listed}", "Fix that and run the same command again: it continues."
        )


_NO_MEMORY = (
    "can't allocate memory",  # torch, on the CPU
    "not enough memory",
    "out of memory",
    "std::bad_alloc",
    "cannot allocate memory",  # the system: mapping a file, loading a library
    "os error 12",
    "failed to map segment",
    "can't start new thread",
    "failed to create thread",
)


def of_resources(error: BaseException) -> LrcError | None:
    """What an exception says if memory or the disk has run out; None if it is about something else.

    Looks at the exceptions that caused it, too: a file that cannot be mapped for want of memory is not damaged.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    for each in chain:
        text = str(each).lower()
        if (
            isinstance(each, MemoryError)
            or type(each).__name__ == "OutOfMemoryError"  # torch's, which may not be imported
            or getattr(each, "errno", None) == errno.ENOMEM
            or (not isinstance(each, LrcError) and any(said in text for said in _NO_MEMORY))
        ):
            limit = resource.getrlimit(resource.RLIMIT_AS)[0]
            taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return ResourceError(
                f"Memory ran out ({one_line(each)}): the process had taken {taken / 1e9:,.2f} GB at most"
                + ("." if limit == resource.RLIM_INFINITY else f", and its limit (ulimit -v) is {limit / 1e9:,.2f} GB."),
                "`lrc plan` predicts what a run takes. Free memory or raise the limit, or take fewer or shorter calibration "
                "samples (--samples, --length), and run the same command again.",
            )
    found = chain[0]
    if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return OutputError(
            f"Cannot write {found.filename or 'a temporary file'}: {found.strerror}.",
            "Free some space (temporary files are in TMPDIR) and run the same command again.",
        )
    return None


def one_line(error: BaseException) -> str:
    """A library's error message on one line: its first line, and the second one if the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: `Did you mean 'x'?`, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."


def brief(text: str, most: int = 160) -> str:
    """A text for a message: on one line, printable, and cut in its middle where it is longer than `most` characters."""
    shown = "".join(char if char.isprintable() else repr(char)[1:-1] for char in (text if len(text) <= 4 * most else
                    f"{text[: 2 * most]}{text[-2 * most:]}"))  # fmt: skip
    return shown if len(shown) <= most else f"{shown[: most // 2]} … {shown[-most // 2 :]}"


def problem(error: Any) -> str:
    """The first mistake that a schema of pydantic found, on one line.

    Args:
        error: a `pydantic.ValidationError`.
    """
    first = error.errors(include_url=False, include_input=False)[0]
    return f"'{brief('.'.join(map(str, first['loc'])))}': {brief(first['msg'])}".removesuffix(".")


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
        if isinstance(errors[0], OutputError):  # nothing was begun: the request names a place that cannot be written
            errors[0].exit_code = RequestError.exit_code
        raise errors[0]
    if errors:
        raise RequestError("\n".join(map(str, errors)))
