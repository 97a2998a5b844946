"""The Pareto front of a sweep: which rows no other row beats in both size and quality, or in both speed and quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .figures import Figure, spec_of

# times as large as the smallest value: from there on an axis is logarithmic
_LOG_COST, _LOG_METRIC = 12.0, 3.0


@dataclass(frozen=True)
class Point:
    """One row.

    Args:
        name: of the row.
        nbytes: of the model's tensors.
        metrics: full metric name -> value.
        speeds: metric -> tokens/s while it was measured, where that is known.
    """

    name: str
    nbytes: int
    metrics: Mapping[str, float]
    speeds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Front:
    """The rows of a sweep.

    Args:
        sweep: its name.
        model: the model that all rows are made of.
        lrc: version that drew it.
        points: the rows.
    """

    sweep: str
    model: str
    lrc: str
    points: Sequence[Point]

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics, in their order."""
        return list(dict.fromkeys(name for point in self.points for name in point.metrics))

    @property
    def speeds(self) -> list[str]:
        """The metrics that a speed is known with."""
        return list(dict.fromkeys(name for point in self.points for name in point.speeds))

    @property
    def largest(self) -> int:
        """Bytes of the largest row."""
        return max(point.nbytes for point in self.points)


def unbeaten(values: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other name beats: none is as good in both values and better in one. Smaller is better.

    Args:
        values: name -> (cost, loss).

    Returns:
        Names in the order of their cost.
    """
    return sorted(
        (
            name
            for name, mine in values.items()
            if not any(other[0] <= mine[0] and other[1] <= mine[1] and other != mine for other in values.values())
        ),
        key=lambda name: values[name],
    )


def smaller_is_better(metric: str) -> bool:
    """Whether a metric measures loss: perplexities and bits per byte do, accuracies do not."""
    return any(word in metric.lower() for word in ("ppl", "perplexity", "bits", "loss", "divergence"))


def front_figures(front: Front) -> list[Figure]:
    """Of each metric: against bytes, and against tokens/s where these were measured with it."""
    found = []
    for number, metric in enumerate(front.metrics):
        points = [point for point in front.points if metric in point.metrics]
        found.append(
            _figure(
                f"bytes-{number}", f"Size and {metric}", metric, points, "MB", lambda point: point.nbytes / 1e6, 1,
                "Rows on the line are the front: no other row is both smaller and better.",
            )
        )  # fmt: skip
        timed = [point for point in points if metric in point.speeds]
        if len(timed) > 1:
            found.append(
                _figure(
                    f"speed-{number}", f"Speed and {metric}", metric, timed, "tokens/s",
                    lambda point, metric=metric: point.speeds[metric], -1,  # type: ignore[misc]
                    "Tokens of the text that each row scored in a second, on the machine of the sweep and as busy as it was. "
                    "Rows on the line are the front: no other row is both faster and better.",
                )
            )  # fmt: skip
    return found


def _figure(
    name: str,
    title: str,
    metric: str,
    points: Sequence[Point],
    unit: str,
    cost: Callable[[Point], float],
    sign: int,
    about: str,
) -> Figure:
    """One figure; `sign` is -1 where more of the cost's unit is better."""
    better = 1 if smaller_is_better(metric) else -1
    values = {point.name: (cost(point), point.metrics[metric]) for point in points}
    best = unbeaten({name: (sign * x, better * y) for name, (x, y) in values.items()})
    rest = [name for name in values if name not in best]
    above, below = ("others", "front") if better == 1 else ("front", "others")  # names stay clear of the line
    places = {above: "top center", below: "bottom center"}
    traces = [_trace(kind, rows, values, unit, places[kind]) for kind, rows in (("others", rest), ("front", best))]
    layout = {
        "height": 480,
        "showlegend": False,
        "xaxis": {
            "title": {"text": unit},
            "type": _axis([x for x, _ in values.values()], _LOG_COST),
            "automargin": True,
            "zeroline": False,
        },
        "yaxis": {
            "title": {"text": metric},
            "type": _axis([y for _, y in values.values()], _LOG_METRIC),
            "automargin": True,
            "zeroline": False,
        },
        "margin": {"l": 8, "r": 48, "t": 24, "b": 48},
    }
    return Figure(name, title, about, spec_of([trace for trace in traces if trace["x"]], layout))


def _trace(
    name: str, rows: Sequence[str], values: Mapping[str, tuple[float, float]], unit: str, place: str
) -> dict[str, object]:
    line = name == "front"
    return {
        "type": "scatter", "name": name, "mode": "lines+markers+text" if line else "markers+text", "text": list(rows),
        "x": [values[row][0] for row in rows], "y": [values[row][1] for row in rows], "textposition": place,
        "cliponaxis": False, "marker": {"size": 10 if line else 7},
        "hovertemplate": f"%{{text}}<br>%{{x:,.4~g}} {unit}<br>%{{y:.4~g}}<extra></extra>",
    }  # fmt: skip


def _axis(values: Sequence[float], times: float) -> str:
    return "log" if min(values) > 0 and max(values) > times * min(values) else "linear"
