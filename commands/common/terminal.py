"""What is printed: plans, progress and results, as tables on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ...depth.base import get_score
from ...model.events import Event, Noted
from ...model.machine.host_memory import peak_rss
from ...plan.budget import readable as size
from ...plan.plan import Draft, Planned, Step
from ...run.layer_loop import LayerDone
from ...run.run import PlanMade, TextRead

if TYPE_CHECKING:
    from ...calibrate.data import Calibration
    from ...evaluation.results import Evaluation
    from ...evaluation.speed import SpeedReport


_FEW_TOKENS = 16


def plain_or_terminal() -> Console:
    """A console that prints brackets and colons of names as they are, and wraps no line where there is no terminal."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 10_000
    return console


def print_plan(plan: Planned, verbose: bool = False) -> None:
    """Print a plan: targets with ranks and bytes, the ratio in its three meanings, what is kept, cost and memory."""
    console, calibration = plain_or_terminal(), plan.recipe.calibration
    console.print(
        f"{plan.model['name']} ({plan.model['type']}, {str(plan.dtype).removeprefix('torch.')}) "
        f"by {plan.recipe.compression[0].name}, "
        + (f"{plan.request}, " if plan.request else "")
        + (
            f"propagate {plan.recipe.propagate}, calibration {calibration.samples} × {calibration.length} tokens"
            if plan.recipe.reads_text
            else "no calibration"
        )
    )
    if isinstance(plan, Draft):
        console.print(
            f"checkpoint: {size(plan.unread)} to read once, for the hash that tells whether it has changed"
            if plan.unread
            else "checkpoint: its hash is known, no file has changed since it was computed"
        )
    table = Table(box=None, pad_edge=False)
    for column in ("targets", "shape", "count", "form", "before", "after"):
        table.add_column(column, justify="left" if column in ("targets", "shape", "form") else "right")
    for label, shape, steps in _by_role(plan.steps, verbose):
        table.add_row(
            label, f"{shape[0]} × {shape[1]}", str(len(steps)), _form(steps),
            size(sum(s.bytes_before for s in steps)), size(sum(s.bytes_after for s in steps)),
        )  # fmt: skip
    console.print(table)
    if plan.recipe.allocation != "uniform":
        shown = "the largest share of each target" if plan.recipe.allocation == "own" else "an even share"
        console.print(f"allocation {plan.recipe.allocation}: the shares are decided after calibration; the table shows {shown}")
    if (found := plan.found) is not None:
        console.print(
            f"searched: ratio {found.ratio:.4f}, held-out perplexity {found.before:.3f} → {found.after:.3f} "
            f"(+{found.increase:.2%}, {found.tokens:,} tokens, {found.evaluations} models measured)"
        )
    elif (rise := plan.recipe.max_ppl_increase) is not None:
        console.print(
            f"the size is searched after calibration: perplexity may rise by {rise:.2%}; the table shows a first guess"
        )
    if plan.gap is not None:
        console.print(f"solver: within {plan.gap:.3%} of the least predicted loss" if plan.gap else "solver: exact")
    if plan.recipe.depth is not None:
        _print_dropped(console, plan)
    if plan.stages:
        after = "".join(f" → {size(nbytes)} ({what})" for what, nbytes in plan.stages)
        console.print(f"steps: {size(plan.targets_before)}{after}")
    numbers_before = sum(step.target.numel for step in plan.steps)
    numbers_after = numbers_before * plan.targets_after // plan.targets_before
    console.print(
        f"removed: {plan.ratio:.2%} of the targets ({size(plan.targets_before)} → {size(plan.targets_after)}, "
        f"{numbers_before:,} → {numbers_after:,} parameters, {plan.bits:.2f} bits per weight); "
        f"{plan.whole_ratio:.2%} of the whole model ({size(plan.whole_bytes)} → {size(plan.whole_after)})"
    )
    _print_kept(console, plan, verbose)
    _print_cost(console, plan)
    console.print(f"memory: about {size(plan.memory.peak)} at the peak (docs/memory.md has the formula)")


def _print_cost(console: Console, plan: Planned) -> None:
    """Print what self-written text and training cost, in tokens beside those of the calibration set."""
    refine, calibration = plan.recipe.refine, plan.recipe.calibration
    tokens = calibration.samples * calibration.length
    if plan.recipe.reads_text and (own := calibration.self_written(calibration.samples)):
        console.print(
            f"calibration: the model, loaded whole, writes {own} of {calibration.samples} samples, "
            f"{calibration.length:,} tokens each"
        )
    if refine is None:
        return
    if refine.block is not None:
        epoch = min(refine.block.epoch_tokens or tokens, tokens)
        console.print(
            f"refinement of blocks: up to {refine.block.epochs} × {epoch:,} tokens through every layer, forward and backward "
            f"(calibration: {tokens:,} forward)"
        )
    if refine.end_to_end is not None:
        work = refine.end_to_end.steps * refine.end_to_end.batch_tokens
        passes = 4 if refine.end_to_end.gradient_checkpointing else 3
        console.print(
            f"refinement end to end: up to {refine.end_to_end.steps} steps of {refine.end_to_end.batch_tokens:,} tokens, the "
            f"compressed model loaded whole; about {passes * work / tokens:.1f} times the forward passes of calibration, and "
            "one of the original"
        )


def _print_dropped(console: Console, plan: Planned) -> None:
    spec = plan.recipe.dropping
    assert spec is not None
    score = get_score(spec.score)
    what = f"layers: {len(plan.dropped)} of {plan.layers} pruned ({', '.join(map(str, plan.dropped))})"
    if plan.model_edit.removed:
        what = f"sub-layers: {len(plan.model_edit.removed)} pruned ({', '.join(plan.model_edit.removed)})"
    known = not score.looks or plan.model_edit.folder is not None
    console.print(f"{what} by {spec.score} [{score.source}]" + ("" if known else "; which ones is decided after calibration"))
    if plan.model_edit.folder is not None:
        _print_repair(console, plan.model_edit.record.get("repair", {}))
    else:
        for line in plan.notes:
            console.print(line)
    if score.by_cosine:
        console.print(
            f"note: {spec.score} compares directions of hidden states only, which breaks some models (Llama 3): "
            "evaluate the result (docs/depth.md)"
        )


def _print_repair(console: Console, record: Mapping[str, Any]) -> None:
    """Print what a finished repair gained."""
    if not record:
        return
    console.print(
        f"repair {record['repair']}: held-out loss {record['loss_without']:.4f} → {record['loss']:.4f} nats per token "
        f"({record['held_out_tokens']:,} tokens)"
    )
    for run in record.get("runs", ()):
        took = run["where"] if run["accepted"] else "not repaired: the held-out loss would rise"
        console.print(f"  layers {run['layers'][0]} to {run['layers'][-1]}: {took}")


def _by_role(steps: Iterable[Step], verbose: bool) -> list[tuple[str, tuple[int, int], list[Step]]]:
    rows: dict[tuple[Any, ...], list[Step]] = defaultdict(list)
    for step in steps:
        target = step.target
        key = (target.name,) if verbose else (target.role,)
        rows[*key, (target.out_features, target.in_features)].append(step)
    return [(key[0], key[-1], group) for key, group in rows.items()]


def _form(steps: Sequence[Step]) -> str:
    dense = [step for step in steps if step.choice.dense]
    parts = [
        said.format(_span(numbers))
        for said, number in (("rank {}", "rank"), ("{} atoms", "atoms"), ("{} channels", "channels"), ("{} bits", "bits"))
        if (numbers := {found for step in steps if (found := getattr(step.choice, number)) is not None})
    ]
    if dense:
        parts.append(f"dense{'' if len(dense) == len(steps) else f' ({len(dense)})'}: {dense[0].why_dense}")
    return ", ".join(parts)


def _span(numbers: Collection[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def print_calibration(calibration: Calibration) -> None:
    """Warn of a calibration text that is too short for the number of samples, or of next to no different tokens."""
    if 0 < (different := calibration.tokens.unique().numel()) < _FEW_TOKENS:
        plain_or_terminal().print(
            f"note: the calibration samples have {different} different tokens: their statistics say little about other text"
        )
    for part in calibration.provenance:
        if part.get("overlap"):
            plain_or_terminal().print(
                f"note: {part['source']} is short for {part['samples']} samples: they share tokens and tell less"
            )


def _print_kept(console: Console, plan: Planned, verbose: bool) -> None:
    for note in plan.weight_notes:
        console.print(f"weights: {note}")
    if plan.left_out:
        named = ", ".join(entry.name for entry in (plan.left_out if verbose else plan.left_out[:3]))
        console.print(
            f"left out: {len(plan.left_out)} tensors ({sum(entry.numel for entry in plan.left_out):,} parameters) of the "
            f"checkpoint that the model of config.json does not have: {named}"
            + ("" if verbose or len(plan.left_out) <= 3 else ", …")
        )
    for reason, files in plan.files_left_out.items():
        shown = ", ".join(files if verbose else files[:3]) + ("" if verbose or len(files) <= 3 else ", …")
        console.print(f"left out: {len(files)} of the files beside the weights ({reason}): {shown}")
    if verbose:
        for kept in plan.kept:
            console.print(f"kept: {kept.name} ({kept.numel:,} parameters): {kept.reason}")
        return
    reasons: dict[str, list[int]] = defaultdict(list)
    for kept in plan.kept:
        reasons[kept.reason].append(kept.numel)
    for reason, numbers in reasons.items():
        console.print(f"kept: {len(numbers)} tensors ({sum(numbers):,} parameters): {reason}")


class Progress:
    """Shows the events of a run: one bar on a terminal and one line per finished layer; plain lines where output is not a
    terminal."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._console = plain_or_terminal()
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("layers", total=None)
        self._plan: Planned | None = None
        self._notes: list[str] = []

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, PlanMade):
            self._plan = event.plan
            self._bar.reset(self._task)
            print_plan(event.plan)
        elif isinstance(event, TextRead):
            if event.calibration.provenance:
                print_calibration(event.calibration)
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
            self._bar.update(self._task, completed=event.done, total=event.total)

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
        self._console.print(
            f"{out}: {size(self._plan.whole_bytes)} → {size(self._plan.whole_after)} in {seconds:.0f} s, "
            f"peak memory {size(peak_rss())} (predicted {size(self._plan.memory.peak)}). "
            "Checked: it loads, its logits are finite."
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
    console.print(table)
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
    console.print(table)
    console.print(
        f"{report.dtype}, {report.threads} threads, memory read at {report.bandwidth / 1e9:.1f} GB/s; medians of "
        f"{len(next(iter(speeds[0].seconds.values())))} rounds"
    )
    for speed in speeds:
        for note in speed.notes:
            console.print(f"note: {speed.model}: {note}")
    for workload, reason in report.why_slower().items():
        console.print(f"slower: {workload}: {reason}")
