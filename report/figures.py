"""The figures of a report, as plotly draws them: layer by role, and bytes by role."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, TypeVar

from .content import Report


class Placed(Protocol):
    """A matrix with its place in the model."""

    @property
    def layer(self) -> int | None: ...
    @property
    def role(self) -> str: ...


P = TypeVar("P", bound=Placed)


@dataclass(frozen=True)
class Figure:
    """A figure with the sentence that says what it shows.

    Args:
        name: of its element on the page.
        title: its heading.
        about: what it shows, in one or two sentences.
        spec: data and layout of plotly, as JSON.
    """

    name: str
    title: str
    about: str
    spec: str


def figures(report: Report) -> list[Figure]:
    """The figures that this result has numbers for."""
    found = [_bytes(report)]
    inside = [line for line in report.targets if line.layer is not None]
    if not inside:
        return found
    found.append(
        heat_map(
            "bits", "Bits per weight", inside, lambda line: line.bits, "%{z:.2f} bits",
            "Stored bits per number of the original matrix, scales and zeros and indices counted. "
            "Dark cells keep most; a gap is a layer or matrix that has left.",
        )
    )  # fmt: skip
    if any(line.rank for line in inside):
        found.append(
            heat_map(
                "rank", "Rank", inside, lambda line: float(line.rank) if line.rank else None, "rank %{z:.0f}",
                "Rank of the factors, or of the correction beside codes.",
            )
        )  # fmt: skip
    if any(line.error is not None for line in inside):
        found.append(
            heat_map(
                "error", "Error of each matrix", inside, lambda line: line.error, "%{z:.2%}",
                "Relative error of the matrix's outputs on the calibration set, where the method measures it so. "
                "Errors of different roles cannot be compared as losses of the model.",
            )
        )  # fmt: skip
    return found


def heat_map(
    name: str,
    title: str,
    lines: Sequence[P],
    value: Callable[[P], float | None],
    shown: str,
    about: str,
) -> Figure:
    """A heat map of layers (columns) by roles (rows); experts of one layer and role are averaged."""
    roles = list(dict.fromkeys(line.role for line in lines))
    layers = range(max(line.layer or 0 for line in lines) + 1)
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for line in lines:
        if (number := value(line)) is not None and line.layer is not None:
            cells[line.role, line.layer].append(number)
    rows = [[fmean(cells[role, layer]) if cells[role, layer] else None for layer in layers] for role in roles]
    heat = {
        "type": "heatmap", "z": rows, "x": list(layers), "y": roles, "colorscale": "Viridis", "reversescale": True,
        "xgap": 1, "ygap": 1, "hovertemplate": f"layer %{{x}}, %{{y}}<br>{shown}<extra></extra>",
        "colorbar": {"thickness": 12, "outlinewidth": 0},
    }  # fmt: skip
    layout = {
        "height": 120 + 26 * len(roles),
        "xaxis": {"title": {"text": "layer"}, "dtick": max(1, len(layers) // 16), "showgrid": False, "zeroline": False},
        "yaxis": {"autorange": "reversed", "showgrid": False, "automargin": True},
    }
    return Figure(name, title, about, spec_of([heat], layout))


def _bytes(report: Report) -> Figure:
    roles = [part.role for part in report.parts]
    bars = [
        {"type": "bar", "orientation": "h", "name": name, "y": roles, "x": [value / 1e6 for value in values],
         "hovertemplate": "%{y}<br>%{x:,.1f} MB<extra>" + name + "</extra>"}
        for name, values in (
            ("before", [part.bytes_before for part in report.parts]), ("after", [part.bytes_after for part in report.parts])
        )
    ]  # fmt: skip
    layout = {
        "height": 140 + 34 * len(roles),
        "barmode": "group",
        "xaxis": {"title": {"text": "MB"}},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    }
    return Figure(
        "bytes",
        "Where the bytes are",
        "Bytes of all matrices of a role, in the original and in the result.",
        spec_of(bars, layout),
    )


def spec_of(data: Sequence[Mapping[str, object]], layout: Mapping[str, object]) -> str:
    """Data and layout of plotly, as JSON, with the margins that all figures have."""
    common: dict[str, object] = {"margin": {"l": 8, "r": 8, "t": 24, "b": 48}, "autosize": True}
    return json.dumps({"data": data, "layout": common | dict(layout)})
