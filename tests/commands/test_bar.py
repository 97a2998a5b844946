"""The bar of a run: what is left is estimated from the stage that runs, what has elapsed counts from the start."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from lrc.commands.common.console import advance, bar_of


def test_a_stage_has_an_estimate_of_its_own():
    now = [0.0]
    bar = bar_of(Console(file=StringIO(), force_terminal=True))
    bar.get_time = lambda: now[0]
    task = bar.add_task("statistics", total=None)

    def after(seconds: float, stage: str, done: int, total: int) -> tuple[float | None, float | None]:
        now[0] += seconds
        advance(bar, task, stage, done, total)
        return bar.tasks[task].elapsed, bar.tasks[task].time_remaining

    after(1, "statistics", 1, 3)
    assert after(1, "statistics", 2, 3) == (2, 1)
    assert after(1, "statistics", 3, 3) == (3, 0)
    # longer steps, which the finished stage says nothing about
    assert after(10, "losses", 1, 3) == (13, None)
    assert after(10, "losses", 2, 3) == (23, 10)
    assert after(5, "layers", 1, 30) == (28, None)
