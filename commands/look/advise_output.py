"""What `lrc advise` answers: two or three recipes with their commands, everything that was tried, and what is not known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from ...plan.budget import readable
from ...run.advice.advice import CLOSE, Trial, picks
from ...run.advice.candidates import LONGER, Candidate
from ..common.console import plain_or_terminal


def answer(
    trials: Sequence[Trial], refused: Mapping[str, str], longer: Sequence[Candidate], command: Callable[[Candidate], str]
) -> dict[str, Any]:
    """The answer as plain data, for `--json` and for the terminal.

    Args:
        trials: ascending in predicted loss.
        refused: recipe -> why it was not tried, or could not be.
        longer: recipes that reach the size and were not tried.
        command: candidate -> the command that makes its result.
    """
    return {
        "picks": [{"why": pick.why, **_row(pick.trial, command)} for pick in picks(trials)],
        "tried": [_row(trial, command) for trial in trials],
        "not_tried": [
            {"recipe": each.name, "about": LONGER[each.name], "bytes": each.draft.whole_after, "command": command(each)}
            for each in longer
        ],
        "refused": dict(refused),
        "unknown": _unknown(trials),
    }


def _row(trial: Trial, command: Callable[[Candidate], str]) -> dict[str, Any]:
    draft, found = trial.candidate.draft, trial.measured
    return {
        "recipe": trial.candidate.name,
        "holds": trial.candidate.kind,
        "predicted_nats": trial.predicted,
        "perplexity_times": trial.times if math.isfinite(trial.times) else None,
        "bytes": draft.whole_after,
        "ratio": draft.ratio,
        "ratio_of_whole_model": draft.whole_ratio,
        "bits": draft.bits,
        "layers_tried": trial.layers,
        "factor": trial.factor,
        "measured": vars(found),
        "seconds": trial.seconds,
        "command": command(trial.candidate),
    }


def _unknown(trials: Sequence[Trial]) -> list[str]:
    """What a person must not take for known."""
    said = [
        "Loss is KL from the original in nats per token, on held-out windows of the trials' text. It is multiplied up from the "
        "layers that were tried as if losses added up: trust the order more than the numbers, and large numbers least.",
        "A run takes more calibration text than a trial, and loses less with it. On text of another kind more is lost.",
        "Training after compression and the speed of results were not tried: lrc bench measures the latter.",
    ]
    near = [
        f"{one.candidate.name} and {other.candidate.name}"
        for one, other in itertools.pairwise(trials)
        if other.predicted < CLOSE * one.predicted
    ]
    return [*said, *([f"Too close to tell apart: {'; '.join(near)}."] if near else [])]


def print_advice(told: Mapping[str, Any]) -> None:
    """Print an answer for a person."""
    console = plain_or_terminal()
    asked = " ".join(f"--{name} {value}" for name, value in told["asked"].items())
    size = told["amount"].get("size")
    reading = f" (weights of {size})" if size and "size" not in told["asked"] else ""
    tokens = max((row["measured"]["tokens"] for row in told["tried"]), default=0)
    console.print(f"{told['model']}, {asked}{reading}; tried on {told['text']}, measured on {tokens:,} held-out tokens of it\n")
    for number, pick in enumerate(told["picks"], 1):
        console.print(f"{number}. {pick['recipe']}: {pick['why']}")
        console.print(f"   {_loss(pick)}, {readable(pick['bytes'])} ({pick['ratio_of_whole_model']:.0%} less)")
        console.print(f"   {pick['command']}", soft_wrap=True)
    if not told["picks"]:
        console.print("No recipe could be tried.")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("\ntried", "predicted\nnats", "measured\nnats", "layers\ntried", "\nbytes", "of the\ntargets"):
        name = column == "\ntried"
        table.add_column(column, justify="left" if name else "right", overflow="fold", no_wrap=name)
    table.add_column("\nholds")
    for row in told["tried"]:
        table.add_row(
            row["recipe"], f"{row['predicted_nats']:.3g}", f"{row['measured']['divergence']:.3g}",
            f"{row['layers_tried']} of {told['layers']}", readable(row["bytes"]), f"-{row['ratio']:.0%}", row["holds"],
        )  # fmt: skip
    console.print()
    console.print(table, soft_wrap=True)
    if told["refused"]:
        console.print("\nNot possible, or not tried to the end:")
        for name, why in told["refused"].items():
            console.print(f"  {name}: {why}")
    if told["not_tried"]:
        console.print("\nAlso reach it, take longer, and were not tried (--recipes NAME tries them):")
        for row in told["not_tried"]:
            console.print(f"  {row['recipe']}: {row['about']}, {readable(row['bytes'])}")
    console.print("\nNot known:")
    for line in told["unknown"]:
        console.print(f"* {line}")


def _loss(pick: Mapping[str, Any]) -> str:
    nats = f"predicted loss {pick['predicted_nats']:.3g} nats"
    if pick["predicted_nats"] > 1:
        return f"{nats} (heavy: a model of little use)"
    if pick["perplexity_times"] < 1.001:
        return f"{nats} (perplexity hardly higher)"
    return f"{nats} (perplexity some {pick['perplexity_times'] - 1:.1%} higher)"
