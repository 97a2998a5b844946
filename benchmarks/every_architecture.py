"""What lrc does with every type of causal language model that the installed transformers has: writes docs/architectures.md.

A tiny random model of each type goes through compress (which plans and checks its result), verify and from_pretrained, with
four recipes (tests/architectures/survey.py). Each type runs in a worker process with a time limit: a crash ends that type only.

    python benchmarks/every_architecture.py                      # every type; under half an hour on two free cores
    python benchmarks/every_architecture.py deepseek_v3 mamba    # some types; prints their rows
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from architectures.survey import STEPS, Outcome, class_name, look_at, types  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
LIMIT = 300  # seconds for one type


def _work(pipe: Any) -> None:
    """In a worker: take types from the pipe and answer with their outcomes."""
    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        while (model_type := pipe.recv()) is not None:
            with tempfile.TemporaryDirectory(prefix="lrc-architecture-") as folder:
                pipe.send(look_at(model_type, Path(folder)))


class Worker:
    """A process that looks at one type after the other; a new one where it crashed or took too long."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def look_at(self, model_type: str) -> Outcome:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._pipe.send(model_type)
            if self._pipe.poll(LIMIT):
                found: Outcome = self._pipe.recv()
                return found
            why = f"fails: no answer within {LIMIT} s"
        except (EOFError, OSError):
            why = "fails: the process ended"
        self._process.kill()
        self._process = None
        return Outcome(model_type, dict.fromkeys(STEPS, why))

    def stop(self) -> None:
        if self._process is not None:
            self._pipe.send(None)
            self._process.join()


def outcomes(wanted: Iterable[str], workers: int) -> Iterator[Outcome]:
    """Of each type, in order."""
    each = [Worker() for _ in range(workers)]
    idle = list(each)

    def one(model_type: str) -> Outcome:
        worker = idle.pop()
        try:
            return worker.look_at(model_type)
        finally:
            idle.append(worker)

    try:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(one, wanted)
    finally:
        for worker in each:
            worker.stop()


def row(outcome: Outcome) -> str:
    """The table's row of one type: a reason that is the same for all recipes is said once."""
    said = [outcome.steps.get(step, "not run") for step in STEPS]
    cells = [said[0].replace("|", "\\|"), *("" for _ in said[1:])] if len(set(said)) == 1 and said[0] != "works" else said
    return f"| `{outcome.model_type}` | `{class_name(outcome.model_type)}` | {' | '.join(cells)} |"


def page(found: Iterable[Outcome]) -> str:
    """docs/architectures.md."""
    rows = [row(each) for each in found]
    return "\n".join([
        "# Architectures",
        "",
        "<!-- written by benchmarks/every_architecture.py: run make architectures -->",
        "",
        f"Every type that transformers {version('transformers')} has a causal language model for. A tiny model of it, with",
        "random weights, was compressed with four recipes; each result was checked and opened with `from_pretrained`, and its",
        "logits were finite. At 8 bits they were also close to the original's, and every tensor that was not compressed was",
        "equal. *refused*: `lrc plan` says so, with this reason, before any work. *not run*: that recipe was not",
        "tried for this table.",
        "",
        "Of a checkpoint with other modalities (images, sound) the text model is compressed, on text; the rest is stored as it",
        "is, and the result opens as the class that its config.json names.",
        "",
        f"| type | class | {' | '.join(STEPS)} |",
        f"|---|---|{'---|' * len(STEPS)}",
        *rows,
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types of configuration; all by default, and then the page is written")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if unknown := set(arguments.types) - set(types()):
        parser.error(f"transformers has no causal language model of type {', '.join(sorted(unknown))}")
    found = []
    for outcome in outcomes(arguments.types or types(), arguments.workers):
        print(row(outcome), flush=True)
        found.append(outcome)
    if not arguments.types:
        PAGE.write_text(page(found), encoding="utf-8")
    if wrong := [each.model_type for each in found if not each.sound]:
        sys.exit(f"{len(wrong)} types end in a traceback or after the work: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
