"""The pages: one HTML file that needs no network, with plotly's script in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .content import Report
from .figures import Figure, figures
from .front import Front, front_figures


def page(report: Report) -> str:
    """The HTML of a report."""
    return rendered("page.html", figures(report), report=report)


def sweep_page(front: Front) -> str:
    """The HTML of a sweep."""
    return rendered("sweep.html", front_figures(front), front=front)


def rendered(template: str, drawn: list[Figure], **values: Any) -> str:
    """The HTML of a template in this folder, with figures and plotly's script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"size": _size, "percent": _percent}
    return environment.get_template(template).render(figures=drawn, plotly=get_plotlyjs(), **values)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes:,} bytes"


def _percent(value: float) -> str:
    return f"{value:.1%}"
