"""What `lrc inspect` found, as a page: the same frame and kinds of figures as a report of a result."""

from __future__ import annotations

from importlib.metadata import version
from statistics import fmean

from ..evaluation.inspection import Inspection, by_role, measure_of
from ..evaluation.spectrum import RATIOS
from .figures import Figure, heat_map, spec_of
from .page import rendered

_STEPS = 41  # places on the axis of the spectra


def inspection_page(found: Inspection) -> str:
    """The HTML of an inspection."""
    return rendered("inspection.html", _figures(found), found=found, roles=by_role(found.matrices), ratios=RATIOS,
                    lrc=version("lrc"))  # fmt: skip


def _figures(found: Inspection) -> list[Figure]:
    whose = "of the outputs on calibration tokens" if found.weighted else "of the weights"
    drawn = [
        heat_map(
            f"energy-{ratio:g}", f"Energy kept at ratio {ratio:g}", found.matrices,
            measure_of(f"energy-{ratio:g}", found.weighted), "%{z:.2%}",
            f"Fraction of the energy {whose} that the rank keeps which this ratio allows; what is missing to 100 % is the "
            "relative squared error of the outputs. Experts are averaged.",
        )
        for ratio in RATIOS
    ]  # fmt: skip
    drawn.append(
        heat_map(
            "effective-rank", "Effective rank", found.matrices, measure_of("rank", found.weighted), "%{z:.1%}",
            f"exp of the entropy of the energies {whose}, as a fraction of the matrix's smaller side. Low is easy to factor.",
        )
    )  # fmt: skip
    drawn.append(_spectra(found, whose))
    drawn.append(
        heat_map(
            "largest", "Largest weight", found.matrices, measure_of("largest", found.weighted), "%{z:.1f}",
            "Largest magnitude over the root mean square. High is hard to round in large groups.",
        )
    )  # fmt: skip
    if found.weighted:
        drawn.append(
            heat_map(
                "input", "Largest input channel", found.matrices, measure_of("input", True), "%{z:.1f}",
                "Root mean square of the largest input channel over that of all. High is hard for rounded activations.",
            )
        )  # fmt: skip
    return drawn


def _spectra(found: Inspection, whose: str) -> Figure:
    places = [step / (_STEPS - 1) for step in range(_STEPS)]
    lines = []
    for role, matrices in by_role(found.matrices).items():
        spectra = [
            (each.points, min(matrix.shape))
            for matrix in matrices
            if (each := matrix.weighted if found.weighted else matrix.plain) is not None
        ]
        if spectra:
            heights = [fmean(_kept(points, round(place * size)) for points, size in spectra) for place in places]
            lines.append(
                {"type": "scatter", "mode": "lines", "name": role, "x": places, "y": heights,
                 "hovertemplate": "%{x:.0%} of the ranks keep %{y:.2%}<extra>" + role + "</extra>"}
            )  # fmt: skip
    layout = {
        "height": 420,
        "xaxis": {"title": {"text": "rank, of the smaller side"}, "tickformat": ".0%"},
        "yaxis": {"title": {"text": "energy kept"}, "tickformat": ".0%", "range": [0, 1.02], "automargin": True},
        "legend": {"orientation": "h", "y": -0.25},
    }
    about = f"Energy {whose} in the leading singular directions, mean over the matrices of a role."
    return Figure("spectra", "Spectra", about, spec_of(lines, layout))


def _kept(points: tuple[tuple[int, float, float], ...], rank: int) -> float:
    """Energy kept at a rank, by straight lines between the points that were kept of the spectrum."""
    before = (0, 0.0)
    for place, _, kept in points:
        if place >= rank:
            low, below = before
            return below + (kept - below) * (rank - low) / max(1, place - low)
        before = (place, kept)
    return before[1]
