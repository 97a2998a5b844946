"""The memory that a plan will take at its peak, predicted from shapes before anything runs; docs/memory.md has the formula."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from ..calibrate.backward import LOGITS_AT_ONCE
from ..calibrate.data import WRITTEN_TOGETHER
from ..calibrate.gradients import gradient_bytes
from ..calibrate.stats import chunks_of
from ..compress.base import BACKWARD_NEEDS
from ..depth.cost import depth_bytes
from ..model.ablation import COPIES, STATES
from ..model.targets import Target
from ..model.view import ModelView
from .plan import PROBED, PROBES_EACH, Memory, Planned, Step

_STILL_TO_COME = 150 << 20  # tokenizer, readers of the calibration text, modules that a plan does without


@dataclass(frozen=True)
class _Moment:
    """What one moment of a run has in memory.

    Args:
        computed: bytes that are where the computation is, on every device.
        kept: bytes that are in main memory in any case.
        passing: bytes that pass through main memory on their way to or from a GPU.
    """

    computed: int
    kept: int = 0
    passing: int = 0

    def in_main(self, devices: Sequence[torch.device]) -> int:
        """Bytes in main memory, where these devices compute."""
        return self.kept + (self.passing if _are_gpus(devices) else len(devices) * self.computed)


def _are_gpus(devices: Sequence[torch.device]) -> bool:
    return any(device.type != "cpu" for device in devices)


def predict_memory(view: ModelView, plan: Planned, devices: Sequence[torch.device]) -> Memory:
    """Predict the peaks of memory from shapes; docs/memory.md states the formula and the reason of each term.

    Args:
        devices: of the run; they share its batches and its units.
    """
    element, calibration = view.dtype.itemsize, plan.recipe.calibration
    read = calibration.samples * calibration.length if plan.recipe.reads_text else 0
    hidden = read * view.config.get_text_config().hidden_size * element
    tokens = plan.batch * calibration.length if plan.recipe.reads_text else 0
    by_layer: dict[int, list[Step]] = defaultdict(list)
    for step in plan.steps:
        by_layer[step.target.layer].append(step)
    layer = max(view.layer_nbytes(index) for index in range(len(view.layers)))
    statistics = max((_collected_bytes(plan, index) for index in by_layer), default=0)
    dense = {step.target.name for step in plan.steps if step.choice.dense}
    solve = max((_solve_bytes([t for t in unit.targets if t.name not in dense]) for unit in plan.units), default=0)
    factors = max((sum(s.bytes_after for s in steps if not s.choice.dense) for steps in by_layer.values()), default=0)
    widest = max((max(s.target.out_features, s.target.in_features) for s in plan.steps), default=0)
    refine = plan.recipe.refine
    both = refine is not None and refine.block is not None
    if both:  # hidden states of two models, and of the windows that are held out
        hidden = 2 * hidden * (calibration.samples + calibration.held_out) // calibration.samples
    activations, passing = 3 * hidden, layer + statistics
    observed = layer + 2 * statistics
    batch = tokens * widest * (2 * element + 8)
    moments = {
        "outside": _Moment(0, view.reading_nbytes(view.outside_nbytes())),
        "embedding": _Moment(0, view.outside_nbytes(for_calibration=True) + activations),
        "forward": _Moment(observed + batch, activations, passing),
        "solve": _Moment(observed + solve, activations + factors, passing),
    }
    if both:
        trained = max(map(_trained_bytes, by_layer.values()), default=0)
        moments["training a layer"] = _Moment(layer + trained + layer + tokens * _graph(view, plan), activations, passing)
    if backward := _backward_bytes(view, plan):
        moments["backward"] = _Moment(backward, activations, backward)
    if plan.recipe.allocation == "kl":
        moments["probes"] = _probe_bytes(view, plan, 2 * statistics + solve)
    moments["training end to end"] = _Moment(_whole_bytes(view, plan), passing=plan.whole_after)
    depth = depth_bytes(view, plan.recipe.dropping, calibration, plan.model_edit)
    moments["depth"] = _Moment(depth, passing=depth)  # mostly hidden states, which wait in main memory
    moments["writing text"] = _Moment(_writing_bytes(view, plan) if plan.recipe.reads_text else 0, passing=plan.whole_bytes)
    main = {name: nbytes for name, each in moments.items() if each.computed + each.kept and (nbytes := each.in_main(devices))}
    gpu = {name: each.computed for name, each in moments.items() if each.computed} if _are_gpus(devices) else {}
    return Memory(psutil.Process().memory_info().rss + _STILL_TO_COME, main, gpu)


def _collected_bytes(plan: Planned, layer: int) -> int:
    """Statistics of the layer's largest chunk."""
    wanted = plan.wanted(layer)
    return max(wanted.nbytes(chunk) for chunk in plan.chunks(layer))


def _backward_bytes(view: ModelView, plan: Planned) -> int:
    """Statistics of gradients: one batch's logits and their gradient, or a layer, its graph of one batch and a chunk's sums."""
    needs = frozenset[str]().union(*plan.needs.values()) & BACKWARD_NEEDS
    if not needs:
        return 0
    tokens, words = plan.batch * plan.recipe.calibration.length, view.config.get_text_config().vocab_size
    end = view.outside_nbytes() + 2 * view.dtype.itemsize * tokens * words + 3 * 4 * min(LOGITS_AT_ONCE, tokens * words)
    grams = 8 if "grad_gram" in needs else 0
    means = 4 if "weight_grad" in needs else 0
    layers = [[step.target for step in plan.layer_steps(index)] for index in range(len(view.layers))]
    chunks = [chunk for targets in layers for chunk in chunks_of(targets, partial(gradient_bytes, needs=needs))]
    summed = max(sum(grams * t.out_features**2 + means * t.numel for t in chunk) for chunk in chunks)
    layer = max(view.layer_nbytes(index) for index in range(len(view.layers)))
    return max(end, layer + summed + tokens * _graph(view, plan))


def _writing_bytes(view: ModelView, plan: Planned) -> int:
    """Calibration text that the model itself writes: the model, and the keys and values of the samples that go together."""
    calibration, text = plan.recipe.calibration, view.config.get_text_config()
    own = calibration.self_written(calibration.samples) + calibration.self_written(calibration.held_out)
    if not own:
        return 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * min(own, WRITTEN_TOGETHER) * calibration.length * len(view.layers) * heads * width * view.dtype.itemsize
    return plan.whole_bytes + cached


def _probe_bytes(view: ModelView, plan: Planned, solve: int) -> _Moment:
    """Variants with one target compressed each, side by side in float32: solving there, or the logits at their end."""
    text, calibration = view.config.get_text_config(), plan.recipe.calibration
    wide = max(1, 4 // view.dtype.itemsize)  # float64 stays
    samples = min(max(PROBED[0], len(calibration.parts())), calibration.samples)  # as `Calibration.few` takes them
    tokens = samples * min(PROBED[1], calibration.length)
    groups = len({(target.layer, target.role) for unit in plan.units for target in unit.targets})
    variants = groups * PROBES_EACH * max(1, len(plan.recipe.alternatives))
    states = min(STATES, (1 + variants) * COPIES * tokens * text.hidden_size * 4)
    layer = wide * max(view.layer_nbytes(index) for index in range(len(view.layers)))
    end = wide * view.outside_nbytes() + 3 * 4 * tokens * text.vocab_size
    return _Moment(max(layer + solve, end), states, max(layer, end))


def _trained_bytes(steps: Iterable[Step]) -> int:
    """Gradient, two moments, a float32 master and the best values of the numbers that forms train: at most what they store."""
    return 20 * sum(_trained(step) for step in steps)


def _trained(step: Step) -> int:
    """Numbers of a form that gradients reach: all of a factor's, and of a quantized matrix the steps of its groups."""
    numbers = step.bytes_after * step.target.numel // step.bytes_before
    return 0 if step.choice.dense else numbers // 8 if step.choice.bits is not None else numbers


def _graph(view: ModelView, plan: Planned) -> int:
    """Bytes that autograd keeps of a token in one layer: what its matrices read and put out, twice for what lies between."""
    widths = [s.target.in_features + s.target.out_features for s in plan.steps if s.target.layer == plan.steps[0].target.layer]
    return 2 * 4 * sum(widths)


def _whole_bytes(view: ModelView, plan: Planned) -> int:
    """An end-to-end refinement: the compressed model, its training, the activations and three times the logits of a step."""
    settings = plan.recipe.refine.end_to_end if plan.recipe.refine is not None else None
    if settings is None:
        return 0
    length = plan.recipe.calibration.length  # windows that are held out are not cut
    layers = 1 if settings.gradient_checkpointing else len(view.layers)
    activations = min(length, settings.length or length) * layers * _graph(view, plan)
    return (
        plan.whole_after + _trained_bytes(plan.steps) + activations + 3 * 4 * length * view.config.get_text_config().vocab_size
    )


def _solve_bytes(targets: Sequence[Target]) -> int:
    """Workspace of one unit in float64: about four copies of the weights and six of the smaller side's square."""
    if not targets:
        return 0
    small = min(sum(target.out_features for target in targets), max(target.in_features for target in targets))
    return 8 * (4 * sum(target.numel for target in targets) + 6 * small**2)
