"""Cost of dropping layers and of repairs, for the plan, before the layers are chosen: forwards, training and memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..model.ablation import BATCH_TOKENS, COPIES, STATES
from .base import Score, Training, get_repair, get_score
from .candidates import Removable, open_layers, open_sublayers
from .model_edit import ModelEdit
from .repairs.partial_finetune import LAST_LAYERS
from .spec import DepthSpec

if TYPE_CHECKING:
    from ..calibrate.data import CalibrationSpec
    from ..model.view import ModelView

_SEEN_TOKENS = 8192  # whose hidden states a score gets, unless it needs more: those of all layers are in memory at once
HELD_WINDOW, HELD_TOKENS = 512, 8192  # of the held-out loss: tokens in a window, and in all windows
_GRAPH = 16  # numbers that a layer keeps for its backward pass, per token and channel of its widest matrix
_WIDENED = 6  # float64 copies of one layer's states that a score works on
_TRAINED = 20  # bytes for each trained number: master, gradient, two moments, best state


def seen_samples(score: Score, hidden: int, samples: int, length: int) -> int:
    """For how many calibration samples a score gets hidden states, in a model with `hidden` channels."""
    return min(samples, max(1, _SEEN_TOKENS // length, math.ceil(score.tokens_per_channel * hidden / length)))


def depth_lines(
    view: ModelView, spec: DepthSpec | None, calibration: CalibrationSpec, model_edit: ModelEdit
) -> tuple[str, ...]:
    """What choosing and repairing will compute, and whether the result needs lrc to load, in words."""
    if spec is None:
        return ()
    lines, tokens = [], calibration.samples * calibration.length
    score = get_score(spec.score)
    if score.tries:
        sublayers = spec.granularity == "sub-layer"
        layers = len(view.layers)
        candidates = len(open_sublayers(view.sublayers, layers, spec) if sublayers else open_layers(layers, spec))
        rounds = len(model_edit.removed) if sublayers else len(model_edit.dropped)
        tries = sum(candidates - gone for gone in range(rounds))
        seen = min(spec.loss_samples, calibration.samples) * min(spec.loss_length, calibration.length)
        lines.append(f"score {spec.score}: some {rounds} rounds, {tries} models, each over {seen:,} tokens")
    lines += _repair_lines(view, spec, tokens)
    if spec.granularity == "layer" and (note := Removable(view, spec).note):
        lines.append(note)
    if model_edit.removed:
        lines.append("the result needs lrc to load: a sub-layer is gone")
    return tuple(lines)


def _repair_lines(view: ModelView, spec: DepthSpec, tokens: int) -> list[str]:
    if spec.repair == "none":
        return []
    repair, width = get_repair(spec.repair), view.config.get_text_config().hidden_size
    started = f"repair {spec.repair} [{repair.source}]: "
    if repair.trained:
        training: Training = repair.make(spec.training)
        trained = _trained(view, repair.on)
        what = "one layer" if repair.on == "layer" else f"norm, head and the last {LAST_LAYERS} layers"
        return [
            f"{started}trains {what} ({trained:,} numbers) for up to {training.epochs} epochs of {tokens:,} tokens, some "
            f"{3 * (training.epochs or 1)} forwards of them; the result needs no lrc to load"
        ]
    where = (
        f"into the matrix before each cut, or behind it as {width} × {width} numbers that need lrc to load"
        if repair.on == "sub-layer"
        else f"each run of dropped layers adds {width} × {width} numbers, and the result needs lrc to load"
    )
    return [f"{started}two forwards over {tokens:,} tokens; {where}; kept where the held-out loss does not rise"]


def depth_bytes(view: ModelView, spec: DepthSpec | None, calibration: CalibrationSpec, model_edit: ModelEdit) -> int:
    """Predicted resident bytes, without the process itself, of choosing and repairing; docs/memory.md has the formula."""
    if spec is None:
        return 0
    element = view.dtype.itemsize
    text = view.config.get_text_config()
    layer = max(view.layer_nbytes(index) for index in range(len(view.layers)))
    token = text.hidden_size * element
    states = calibration.samples * calibration.length * token
    logits = 3 * 4 * BATCH_TOKENS * text.vocab_size + view.outside_nbytes()
    moments, score = [0], get_score(spec.score)
    if score.looks == "states":
        seen = seen_samples(score, text.hidden_size, calibration.samples, calibration.length) * calibration.length
        moments.append(layer + (len(view.layers) + 1) * seen * token + _WIDENED * 8 * seen * text.hidden_size)
    if score.tries:
        candidates = len(view.sublayers) if spec.granularity == "sub-layer" else len(view.layers)
        seen = min(spec.loss_samples, calibration.samples) * min(spec.loss_length, calibration.length)
        moments.append(layer + min(STATES, candidates * COPIES * seen * token) + logits)
    if spec.repair != "none":
        repair = get_repair(spec.repair)
        held = min(HELD_TOKENS, calibration.samples * calibration.length)
        moments.append(layer + min(STATES, (len(model_edit.dropped) + 1) * COPIES * held * token) + logits)
        if repair.trained:
            at_once = calibration.length if repair.on == "end" else max(2048, calibration.length)
            widest = max(max(t.out_features, t.in_features) for t in view.targets)
            graph = at_once * widest * element * _GRAPH * (LAST_LAYERS if repair.on == "end" else 1)
            head = 3 * 4 * calibration.length * text.vocab_size + view.outside_nbytes() if repair.on == "end" else 0
            weights = layer * (LAST_LAYERS if repair.on == "end" else 1)
            moments.append(weights + COPIES * states + _TRAINED * _trained(view, repair.on) + graph + head)
        else:
            moments.append(layer + 2 * COPIES * states + 8 * 6 * text.hidden_size**2)
    return max(moments)


def _trained(view: ModelView, on: str) -> int:
    layer = max(sum(p.numel() for p in each.parameters()) for each in view.layers)
    if on == "layer":
        return layer
    head = view.untied_head
    return LAST_LAYERS * layer + (0 if head is None else head.weight.numel())
