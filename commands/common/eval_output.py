"""The results of an evaluation as a table and a file, also where it is interrupted or fails."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from ...checkpoint.atomic import PARTIAL, remove, replacing
from ...errors import EvaluationError, OutputError
from ...evaluation.results import Evaluation, results_json
from .terminal import print_results


@contextmanager
def reporting(evaluations: Sequence[Evaluation], json_file: Path | None) -> Iterator[None]:
    """Print and write evaluations when the context ends, also where it ends in an error or is interrupted.

    Args:
        evaluations: of the model, and of the baseline where there is one; filled while the context is open.
        json_file: written, too, where it is given.

    Raises:
        EvaluationError: the two were measured by different protocols; after both were printed and written.
        OutputError: the file cannot be written; after everything was printed.
    """
    whole = False
    try:
        yield
        whole = True
    finally:
        if any(evaluation.results for evaluation in evaluations):
            _report(evaluations, json_file, whole)


def _report(evaluations: Sequence[Evaluation], json_file: Path | None, whole: bool) -> None:
    side_by_side = whole and len(evaluations) == 2
    different: EvaluationError | None = None
    try:
        if side_by_side:
            print_results(*evaluations)
    except EvaluationError as error:
        different = error
    if different is not None or not side_by_side:
        for evaluation in evaluations:
            if evaluation.results:
                print_results(evaluation)
    if json_file is not None:
        try:
            _write(json_file.resolve(), json.dumps(results_json(*evaluations), indent=2) + "\n")
        except OSError as error:
            raise OutputError(f"Cannot write --json {json_file}: {error}", "The numbers are in the table above.") from error
    if different is not None:
        raise different


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all. What cannot be replaced (a pipe, a device, a file in a locked folder) is written to."""
    if (file.exists() and not file.is_file()) or not os.access(file.parent, os.W_OK):
        file.write_text(text)
        return
    for leftover in file.parent.glob(f"{escape(file.name)}.*{PARTIAL}"):
        remove(leftover)  # of a process that was killed here
    with replacing(file) as temporary:
        temporary.write_text(text)
