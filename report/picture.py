"""Figures as PNG files, drawn by matplotlib (the extra `lrc[pictures]`) from the same data as on the pages."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import replacing, writing
from ..errors import RequestError
from .figures import Figure

_MARK, _SOFT = "#2a6f97", "#8a939d"
_INCH = 100  # pixels of a page's figure; the file has twice as many
HINT = "Install matplotlib: pip install 'lrc[pictures]'"


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_pictures() -> None:
    """Refuse pictures where nothing can draw them.

    Raises:
        RequestError: matplotlib is not installed.
    """
    if not can_draw():
        raise RequestError("PNG files are drawn by matplotlib, which is not installed.", f"{HINT}. The page needs nothing.")


def draw(figure: Figure, path: Path) -> None:
    """Draw a figure into a PNG file.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure as Canvas

    spec = json.loads(figure.spec)
    layout = spec["layout"]
    canvas = Canvas(figsize=(9, layout["height"] / _INCH), layout="constrained")
    axes: Any = canvas.add_subplot()
    axes.set_title(figure.title, loc="left")
    for number, trace in enumerate(spec["data"]):
        _DRAWN[trace["type"]](canvas, axes, trace, number)
    for name, axis in (("x", layout.get("xaxis", {})), ("y", layout.get("yaxis", {}))):
        getattr(axes, f"set_{name}label")(axis.get("title", {}).get("text", ""))
        if axis.get("type") == "log":
            getattr(axes, f"set_{name}scale")("log")
            getattr(axes, f"{name}axis").set_major_formatter("{x:g}")
            getattr(axes, f"{name}axis").set_minor_formatter("{x:g}")
    if layout.get("yaxis", {}).get("autorange") == "reversed" and not axes.yaxis_inverted():
        axes.invert_yaxis()
    if any(trace["type"] == "bar" for trace in spec["data"]):
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with writing(path), replacing(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=2 * _INCH)


def _heatmap(canvas: Any, axes: Any, trace: dict[str, Any], number: int) -> None:
    cells = [[float("nan") if value is None else value for value in row] for row in trace["z"]]
    image = axes.imshow(cells, aspect="auto", cmap="viridis_r", interpolation="nearest")
    axes.set_yticks(range(len(trace["y"])), trace["y"])
    canvas.colorbar(image, ax=axes, pad=0.01)


def _bars(canvas: Any, axes: Any, trace: dict[str, Any], number: int) -> None:
    places = [place + 0.4 * number - 0.2 for place in range(len(trace["y"]))]
    axes.barh(places, trace["x"], height=0.38, label=trace["name"], color=(_SOFT, _MARK)[number])
    axes.set_yticks(range(len(trace["y"])), trace["y"])
    axes.grid(axis="x", alpha=0.3)


def _points(canvas: Any, axes: Any, trace: dict[str, Any], number: int) -> None:
    front = trace["name"] == "front"
    style = {"color": _MARK, "marker": "o", "linewidth": 2} if front else {"color": _SOFT, "marker": "o", "linestyle": ""}
    axes.plot(trace["x"], trace["y"], **style)
    for x, y, text in zip(trace["x"], trace["y"], trace["text"], strict=True):
        axes.annotate(
            text,
            (x, y),
            xytext=(0, 7 if trace["textposition"] == "top center" else -14),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="black" if front else _SOFT,
        )
    axes.margins(0.12)
    axes.grid(alpha=0.3)


_DRAWN = {"heatmap": _heatmap, "bar": _bars, "scatter": _points}
