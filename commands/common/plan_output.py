"""What is printed of a plan: a table of targets, the ratio in its three meanings, what is kept, cost and memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ...depth.base import get_score
from ...plan.budget import readable as size
from ...plan.plan import DELETED_EARLY, Draft, Planned, Step, short_of_tokens
from .console import plain_or_terminal


def print_plan(plan: Planned, verbose: bool = False, console: Console | None = None) -> None:
    """Print a plan: targets with ranks and bytes, the ratio in its three meanings, what is kept, cost and memory."""
    console = console or plain_or_terminal()
    _print_heading(console, plan)
    table = Table(box=None, pad_edge=False)
    for column in ("targets", "shape", "count", "form", "before", "after"):
        table.add_column(column, justify="left" if column in ("targets", "shape", "form") else "right")
    for label, shape, steps in _by_role(plan.steps, verbose):
        table.add_row(
            label, f"{shape[0]} × {shape[1]}", str(len(steps)), _form(steps),
            size(sum(s.bytes_before for s in steps)), size(sum(s.bytes_after for s in steps)),
        )  # fmt: skip
    console.print(table, soft_wrap=True)
    if plan.recipe.allocation != "uniform":
        shown = "the largest share of each target" if plan.recipe.allocation == "own" else "an even share"
        console.print(f"allocation {plan.recipe.allocation}: the shares are decided after calibration; the table shows {shown}")
    _print_search(console, plan)
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
    if plan.expands:
        _print_file(console, plan)
    _print_kept(console, plan, verbose)
    _print_text(console, plan)
    _print_cost(console, plan)
    _print_disk(console, plan)
    gpu = f", and {size(plan.memory.gpu_peak)} on each GPU" if plan.memory.on_gpu else ""
    console.print(f"memory: about {size(plan.memory.peak)} at the peak{gpu} (docs/memory.md has the formula)")


def _print_heading(console: Console, plan: Planned) -> None:
    """Print what is compressed by what, and whether its files are read for a hash first."""
    calibration = plan.recipe.calibration
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


def _print_search(console: Console, plan: Planned) -> None:
    """Print the size that a search found, or that there will be one."""
    if (found := plan.found) is not None:
        console.print(
            f"searched: ratio {found.ratio:.4f}, held-out perplexity {found.before:.3f} → {found.after:.3f} "
            f"(+{found.increase:.2%}, {found.tokens:,} tokens, {found.evaluations} models measured)"
        )
    elif (rise := plan.recipe.max_ppl_increase) is not None:
        console.print(
            f"the size is searched after calibration: perplexity may rise by {rise:.2%}; the table shows a first guess"
        )


def _print_disk(console: Console, plan: Planned) -> None:
    """Print the most that the run has on the disk, and what it is made of."""
    beside = ", ".join(
        f"{size(nbytes)} of {kind}{' (before the result)' if kind in DELETED_EARLY else ''}"
        for kind, nbytes in plan.scratch.items()
    )
    console.print(
        f"disk: {size(plan.disk_peak)} at the peak: {size(plan.whole_after)} of weights, up to "
        f"{size(plan.disk_bytes - plan.whole_after)} more while the parts are merged into files of at most "
        f"{size(plan.max_shard_bytes)}" + (f", and while the run lasts {beside}" if beside else "")
    )


def plan_json(plan: Planned) -> dict[str, Any]:
    """What a plan says, as data; sizes in bytes."""
    return {
        "model": plan.model | {"dtype": str(plan.dtype).removeprefix("torch."), "layers": plan.layers},
        "recipe": plan.recipe.resolved(),
        "request": plan.request,
        "ratio": plan.ratio,
        "ratio_of_whole_model": plan.whole_ratio,
        "bits_per_weight": plan.bits,
        "bytes": {
            "file": plan.file_bytes, "model_before": plan.whole_bytes, "model_after": plan.whole_after,
            "targets_before": plan.targets_before, "targets_after": plan.targets_after,
        },
        "memory": {
            "peak": plan.memory.peak, "process": plan.memory.process, "moments": dict(plan.memory.moments),
            "gpu_peak": plan.memory.gpu_peak, "on_gpu": dict(plan.memory.on_gpu),
        },
        "disk": {"peak": plan.disk_peak, "result": plan.disk_bytes, "beside": dict(plan.scratch)},
        "too_few_tokens": short_of_tokens(plan) if plan.recipe.reads_text else {},
        "targets": [
            {
                "name": step.target.name, "shape": [step.target.out_features, step.target.in_features],
                "bytes_before": step.bytes_before, "bytes_after": step.bytes_after, "why_dense": step.why_dense,
                "choice": {key: value for key, value in vars(step.choice).items() if value is not None},
            }
            for step in plan.steps
        ],
        "kept": [{"name": kept.name, "parameters": kept.numel, "reason": kept.reason} for kept in plan.kept],
    }  # fmt: skip


def _print_file(console: Console, plan: Planned) -> None:
    """Print what a quantized file takes as it is, and warn of a result that is larger."""
    dtype = str(plan.dtype).removeprefix("torch.")
    console.print(f"file: {size(plan.file_bytes)} as it is, {size(plan.whole_bytes)} in {dtype}, of which all ratios here are")
    if plan.whole_after > plan.file_bytes:
        console.print(
            f"note: the result ({size(plan.whole_after)}) is larger than the file that it is made of ({size(plan.file_bytes)}, "
            f"quantized already); a smaller one needs --size below {size(plan.file_bytes)} and a recipe that quantizes"
        )


def _print_text(console: Console, plan: Planned) -> None:
    """Warn, once for all targets, of fewer calibration tokens than the statistics have dimensions."""
    calibration = plan.recipe.calibration
    tokens = calibration.samples * calibration.length
    if not plan.recipe.reads_text or not (short := short_of_tokens(plan)):
        return
    widest = max(short.values())
    samples = -(-widest // calibration.length)
    console.print(
        f"note: {tokens:,} calibration tokens are too few for {', '.join(list(short)[:4])}{', …' if len(short) > 4 else ''}: "
        f"their statistics have up to {widest:,} dimensions, of which some stay unknown; --samples {samples} would do "
        f"({samples * calibration.length:,} tokens)"
    )


def _print_cost(console: Console, plan: Planned) -> None:
    """Print what self-written text and training cost, in tokens beside those of the calibration set."""
    refine, calibration = plan.recipe.refine, plan.recipe.calibration
    tokens = calibration.samples * calibration.length
    for remark in plan.recipe.compression[1].remarks():
        console.print(f"note: {remark}", markup=False)
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
