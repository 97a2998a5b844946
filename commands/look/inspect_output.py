"""What `lrc inspect` prints: two lines for each role, and a map of layers by roles that is readable without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...evaluation.inspection import Inspection, Matrix, by_role, map_of, summary
from ...evaluation.spectrum import RATIOS
from ...plan.budget import readable
from ..common.console import plain_or_terminal

MAPS = {
    "energy-0.2": "energy kept at ratio 0.2", "energy-0.4": "energy kept at ratio 0.4",
    "energy-0.6": "energy kept at ratio 0.6", "rank": "effective rank, of the smaller side",
    "largest": "largest weight over rms", "kurtosis": "kurtosis of the weights",
    "input": "largest input channel over rms",
}  # fmt: skip
_PERCENT = ("rank", "energy-0.2", "energy-0.4", "energy-0.6")
_PLAIN_WIDTH = 100  # of the map where there is no terminal
_EASY, _HARD = (38, 70, 83), (231, 111, 81)


def print_inspection(found: Inspection, shown: str) -> None:
    """Print what was found; `shown` is the number on the map, of `MAPS`."""
    console = plain_or_terminal()
    file = f" (a file of {readable(found.file_bytes)})" if found.file_bytes < 0.9 * found.bytes else ""
    console.print(
        f"{found.model} ({found.architecture}, {found.dtype}): {found.layers} layers, {found.numel / 1e6:,.1f} M numbers, "
        f"{readable(found.bytes)}{file}; {len(found.matrices)} targets take {readable(found.target_bytes)}"
    )
    console.print("\nThe weights alone")
    console.print(_table(found.matrices, ["rank", *_energies(), "largest", "kurtosis"], weighted=False), soft_wrap=True)
    if found.weighted:
        sources = ", ".join(str(each["source"]) for each in found.calibration)
        console.print(f"\nTheir outputs on {found.samples[0]} × {found.samples[1]} tokens of {sources}")
        console.print(_table(found.matrices, ["rank", *_energies(), "input"], weighted=True), soft_wrap=True)
        unseen = sum(not matrix.tokens for matrix in found.matrices)
        if unseen:
            console.print(f"note: no token reached {unseen} of {len(found.matrices)} targets: more --samples")
    console.print(
        "\nL: the layer of the worst. Effective rank: exp of the entropy of the squared singular values, here in % of the "
        "smaller side. Kept: their energy in % at the rank that a ratio allows; what is missing is the relative "
        "squared error of the outputs. Kurtosis: 3 for a normal distribution."
    )
    if shown != "none":
        whose = "" if shown in ("largest", "kurtosis", "input") else ", outputs" if found.weighted else ", weights alone"
        print_map(console, f"{MAPS[shown]}{whose}", map_of(found.matrices, shown, found.weighted, found.layers), shown)


def _energies() -> list[str]:
    return [f"energy-{ratio:g}" for ratio in RATIOS]


_HEADINGS = {
    "rank": "effective\nrank", "largest": "largest\nover rms", "kurtosis": "kurtosis\n", "input": "largest input\nover rms",
}  # fmt: skip


def _table(matrices: Sequence[Matrix], columns: Sequence[str], weighted: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nrole", overflow="fold")
    table.add_column("", no_wrap=True)
    for what in columns:
        table.add_column(_HEADINGS.get(what, f"kept\nat {what[7:]}"), justify="right", no_wrap=True)
    for role, members in by_role(matrices).items():
        found = {what: summary(members, what, weighted) for what in columns}
        shapes = {matrix.shape for matrix in members}
        shape = f"{members[0].shape[0]} × {members[0].shape[1]}" if len(shapes) == 1 else "several shapes"
        table.add_row(role, "mean", *(_said(what, each.mean) if each else "–" for what, each in found.items()))
        table.add_row(
            f"  {len(members)} of {shape}", "worst",
            *(_said(what, each.worst) + f" L{each.layer}" if each else "–" for what, each in found.items()),
            style="dim",
        )  # fmt: skip
    return table


def _said(what: str, value: float) -> str:
    return f"{100 * value:.1f}" if what in _PERCENT else f"{value:.1f}"


def print_map(console: Console, title: str, rows: Mapping[str, Sequence[float | None]], what: str) -> None:
    """Print a map of layers (columns) by roles (rows): a digit per cell, coloured where the terminal has colours.

    Layers that do not fit beside each other go into a next block. 9 is the hardest to compress, whatever the number.
    """
    values = [value for row in rows.values() for value in row if value is not None]
    if not values:
        return
    low, high = min(values), max(values)
    easy, hard = (high, low) if what.startswith("energy") else (low, high)
    said = [f"{_said(what, each)}{' %' if what in _PERCENT else ''}" for each in (easy, hard)]
    console.print(f"\nMap of layers: {title}. 0: {said[0]}, 9: {said[1]} (hardest); · where there is none")
    label = max(map(len, rows))
    width = console.width if console.is_terminal else _PLAIN_WIDTH
    layers = len(next(iter(rows.values())))
    room = max(10, width - label - 1)
    wide = 2 if 2 * layers <= room else 1
    step = room // wide
    for start in range(0, layers, step):
        stop = min(start + step, layers)
        console.print(f"{'':{label}} {_ruler(start, stop, wide)}")
        for role, row in rows.items():
            line = Text(f"{role:{label}} ")
            for value in row[start:stop]:
                share = 0.0 if value is None or easy == hard else (value - easy) / (hard - easy)
                line.append_text(_cell(None if value is None else share, wide))
            console.print(line, no_wrap=True, crop=True)


def _ruler(start: int, stop: int, wide: int) -> str:
    """The numbers of every fifth layer, above their cells."""
    line = ""
    for layer in range(start, stop):
        at = (layer - start) * wide
        if (layer % 5 == 0 or layer == start) and len(line) <= at:
            line = f"{line:{at}}{layer:>{wide}}" if at else f"{layer:>{wide}}"
            line += " " if len(str(layer)) > wide else ""
    return line


def _cell(share: float | None, wide: int) -> Text:
    if share is None:
        return Text(f"{'·':>{wide}}")
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(_EASY, _HARD, strict=True))
    return Text(f"{min(9, int(10 * share)):>{wide}}", style=f"white on rgb({red},{green},{blue})")
