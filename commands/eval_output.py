"""What an evaluation found, as a table and as a file; what was found is kept where it is cut short."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import EvaluationError, OutputError
from ..evaluation.evaluate import TaskResult, results_json
from .terminal import print_results


@contextmanager
def reporting(names: Sequence[str], json_file: Path | None) -> Iterator[list[list[TaskResult]]]:
    """Gives a list of results for each model, to be filled; at the end, however it comes, they are printed and written.

    Args:
        names: of the model, and of the baseline where there is one.
        json_file: where the results go too.

    Raises:
        EvaluationError: the two were measured in ways that cannot be compared; after both were printed and written.
        OutputError: the file cannot be written; after everything was printed.
    """
    measured: list[list[TaskResult]] = [[] for _ in names]
    whole = False
    try:
        yield measured
        whole = True
    finally:
        if any(measured):
            _put_down(names, measured, json_file, whole)


def _put_down(names: Sequence[str], measured: Sequence[list[TaskResult]], json_file: Path | None, whole: bool) -> None:
    apart: EvaluationError | None = None
    try:
        if whole and len(names) == 2:
            print_results(names[0], measured[0], names[1], measured[1])
    except EvaluationError as error:
        apart = error
    if apart is not None or not whole or len(names) == 1:
        for name, results in zip(names, measured, strict=True):
            if results:
                print_results(name, results)
    if json_file is not None:
        document = results_json(names[0], measured[0], *((measured[1], names[1]) if len(names) == 2 else ()))
        try:
            json_file.write_text(json.dumps(document, indent=2) + "\n")
        except OSError as error:
            raise OutputError(f"Cannot write --json {json_file}: {error}", "The numbers are in the table above.") from error
    if apart is not None:
        raise apart
