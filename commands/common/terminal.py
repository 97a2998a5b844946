"""What is printed of a run, its progress and results, as tables on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ...calibrate.data import NO_TEXT, Calibration
from ...errors import LrcError
from ...model.events import Event, Noted
from ...model.machine.host_memory import peak_rss
from ...plan.budget import readable as size
from ...plan.plan import Planned
from ...run.duration.foretell import Foretold
from ...run.layer_loop import LayerDone
from ...run.request import Request
from ...run.run import PlanMade, TextRead
from .console import advance, bar_of, messages, plain_or_terminal
from .plan_output import print_plan
from .time_output import print_duration

if TYPE_CHECKING:
    from ...evaluation.results import Evaluation
    from ...evaluation.speed import SpeedReport


_FEW_TOKENS = 16


def print_calibration(calibration: Calibration, console: Console) -> None:
    """Warn of a calibration text that is too short for the number of samples, or of next to no different tokens."""
    if 0 < (different := calibration.tokens.unique().numel()) < _FEW_TOKENS:
        console.print(
            f"note: the calibration samples have {different} different tokens: their statistics say little about other text"
        )
    for part in calibration.provenance:
        if part.get("overlap"):
            console.print(f"note: {part['source']} is short for {part['samples']} samples: they share tokens and tell less")


class Progress:
    """Shows the events of a run: one bar on a terminal and one line per finished layer; plain lines where output is not a
    terminal."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._console = messages()
        self._bar = bar_of(self._console)
        self._task = self._bar.add_task("layers", total=None)
        self._plan: Planned | None = None
        self._notes: list[str] = []
        self._calibration = NO_TEXT

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, PlanMade):
            self._plan = event.plan
            self._bar.reset(self._task)
            print_plan(event.plan, console=self._console)
        elif isinstance(event, Foretold):
            assert self._plan is not None, "a run tells its plan first"
            print_duration(event.duration, self._plan, self._console)
        elif isinstance(event, TextRead):
            self._calibration = event.calibration
            if event.calibration.provenance:
                print_calibration(event.calibration, self._console)
            self._bar.start()
        elif isinstance(event, LayerDone):
            self._layer(event)
        elif isinstance(event, Noted):
            self._console.print(f"note: {event.stage}")
        elif event.loss is not None:
            self._console.print(
                f"{event.stage} {event.done:>3}/{event.total}  {event.loss:.4f} nats from the original on held-out text, "
                f"peak {size(peak_rss())}"
            )
        else:
            place = f" {event.done:>3}/{event.total}" if event.done else ""
            self._console.print(f"{event.stage}{place}  {event.seconds:.1f} s, peak {size(peak_rss())}")
        if event.done:
            stage = "layers" if isinstance(event, LayerDone) else event.stage
            advance(self._bar, self._task, stage, event.done, event.total)

    def _layer(self, layer: LayerDone) -> None:
        solved = [record for record in layer.records if record.error is not None]
        self._notes += [f"{record.name}: {record.note}" for record in solved if record.note]
        if layer.resumed:
            text = "finished earlier, replayed"
        elif solved:
            mean = sum(record.error or 0.0 for record in solved) / len(solved)
            ranks = sorted(record.form["rank"] for record in solved if "rank" in record.form)
            shown = f", ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
            damping = max(record.damping for record in solved)
            text = f"{len(solved)} targets{shown}, relative error {mean:.4f}, damping {damping:g}"
        else:
            text = "all dense"
        self._console.print(
            f"layer {layer.done:>3}/{layer.total}  {text}, {layer.seconds:.1f} s, peak {size(layer.peak_bytes)}"
        )

    def finish(self, out: Path) -> None:
        """Print warnings, what was written, how long it took, and the peak memory."""
        assert self._plan is not None, "a run tells its plan first"
        if self._plan.request:
            self._console.print(f"{out}: {self._plan.request}")
        for note in self._notes[:10]:
            self._console.print(f"note: {note}")
        if len(self._notes) > 10:
            self._console.print(f"note: … and {len(self._notes) - 10} more in {out / 'lrc.json'}")
        seconds = time.perf_counter() - self._started
        self._bar.stop()
        before = f" (a file of {size(self._plan.file_bytes)})" if self._plan.expands else ""
        plain_or_terminal().print(
            f"{out}: {size(self._plan.whole_bytes)}{before} → {size(self._plan.whole_after)} in {seconds:.0f} s, "
            f"peak memory {size(peak_rss())} (predicted {size(self._plan.memory.peak)}). "
            "Checked: it loads, its logits are finite."
        )

    def checked(self, out: Path, request: Request) -> None:
        """Measure what a finished result lost, and print it with the command that measures more; it is finished in any case."""
        from ...run.losses.held_out import quick_check

        try:
            found = quick_check(request.view(), out, self._calibration, request.devices)
        except LrcError as error:
            self._console.print(f"note: not checked by perplexity: {error.what}")
            return
        plain_or_terminal().print(
            f"{out}: perplexity {found.before:.2f} → {found.after:.2f} over {found.tokens:,} tokens of {found.text}; "
            f"more by: lrc eval {out} --baseline {request.location.name}"
        )


def print_results(evaluation: Evaluation, baseline: Evaluation | None = None) -> None:
    """A table of metrics, with the baseline's and the differences beside them where there is one.

    Raises:
        EvaluationError: the two cannot be compared; nothing was printed.
    """
    from ...evaluation.results import compare

    console = plain_or_terminal()
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    table.add_column(evaluation.model, justify="right", overflow="fold")
    table.add_column("± standard error", justify="right")
    if baseline is None:
        table.add_column("tokens", justify="right")
        for result in evaluation.results:
            table.add_row(
                result.metric, f"{result.value:.4f}", _error(result.stderr), f"{result.tokens:,}" if result.tokens else ""
            )
    else:
        table.add_column(baseline.model, justify="right", overflow="fold")
        table.add_column("difference", justify="right")
        metrics = evaluation.metrics
        for row in compare(evaluation, baseline):
            table.add_row(
                row["metric"], f"{row['value']:.4f}", _error(metrics[row["metric"]].stderr), f"{row['baseline']:.4f}",
                f"{row['difference']:+.4f}" + ("" if row["relative"] is None else f" ({row['relative']:+.1%})"),
            )  # fmt: skip
    console.print(table, soft_wrap=True)
    for result in evaluation.results:
        speed = result.protocol.get("tokens_per_second")
        if speed:
            console.print(f"{result.task}: {speed:,.0f} tokens/s on {result.protocol.get('device', '?')}")


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def print_speed(report: SpeedReport) -> None:
    """Print the figures of one model, or of two and their ratios."""
    console, speeds = plain_or_terminal(), report.speeds
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for speed in speeds:
        table.add_column(speed.model, justify="right", overflow="fold")
    both = len(speeds) == 2
    if both:
        table.add_column("times as fast", justify="right")
    for workload in speeds[0].seconds:
        milliseconds = workload == "first token"
        shown = [f"{1e3 * s.median(workload):,.1f} ms" if milliseconds else f"{s.rate(workload):,.1f} tokens/s" for s in speeds]
        table.add_row(workload, *shown, *([f"{speeds[0].times_as_fast_as(speeds[1], workload):.2f}"] if both else []))
    table.add_row("load", *(f"{speed.load_seconds:.1f} s" for speed in speeds))
    table.add_row("files of weights", *(size(speed.file_bytes) for speed in speeds))
    table.add_row("tensors in memory", *(size(speed.tensor_bytes) for speed in speeds))
    table.add_row("resident memory", *(size(max(0, speed.resident_bytes)) for speed in speeds))
    table.add_row("read for a token", *(size(speed.read_bytes) for speed in speeds))
    shares = [report.share(speed) for speed in speeds]
    if None not in shares:
        table.add_row("time that reading takes", *(f"{share:.0%} of a token" for share in shares))
    console.print(table, soft_wrap=True)
    console.print(
        f"{report.dtype}, {report.threads} threads, memory read at {report.bandwidth / 1e9:.1f} GB/s; medians of "
        f"{len(next(iter(speeds[0].seconds.values())))} rounds"
    )
    for speed in speeds:
        for note in speed.notes:
            console.print(f"note: {speed.model}: {note}")
    for workload, reason in report.why_slower().items():
        console.print(f"slower: {workload}: {reason}")
