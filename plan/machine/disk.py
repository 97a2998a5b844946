"""The disk that a plan takes beside the weights of its result, predicted from shapes; docs/memory.md has the formula."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from ...calibrate.stats import wanted
from ...compress.base import BACKWARD_NEEDS, FORWARD_NEEDS
from ...model.targets import Target
from ...model.view import ModelView
from ..plan import Planned

_CURVE = 400  # bytes of an option and its loss in the JSON of a measured curve
_THINNED = 64  # options of a unit that are measured, unless a rule needs every rank (run/losses/curves.py)


def predict_disk(view: ModelView, plan: Planned) -> dict[str, int]:
    """Kind of file -> bytes that a run keeps on the disk beside the weights of its result, at most."""
    calibration = plan.recipe.calibration
    element, hidden = view.dtype.itemsize, view.config.get_text_config().hidden_size
    tokens = calibration.samples * calibration.length if plan.recipe.reads_text else 0
    found: dict[str, int] = {}
    if tokens and (plan.collects or plan.recipe.max_ppl_increase is not None):  # trials of a search share statistics
        by_layer = _by_layer(view)
        found["statistics"] = sum(_forward_bytes(targets, plan.needs) for targets in by_layer.values())
        if kinds := frozenset[str]().union(*plan.needs.values()) & BACKWARD_NEEDS:
            found["statistics of gradients"] = sum(_backward_bytes(target, kinds) for target in view.targets)
            found["activations"] = len(view.layers) * tokens * hidden * element
    if plan.collects and plan.recipe.allocation != "uniform":
        found["losses"] = _CURVE * sum(_measured(plan, len(options)) for options in plan.options.values())
    settings = plan.recipe.refine.end_to_end if plan.recipe.refine is not None else None
    if settings is not None:
        found["states of the original"] = (tokens + calibration.held_out * calibration.length) * hidden * element
        found["state of the training"] = 16 * plan.targets_after // element  # a master, two moments, the best values
    if plan.recipe.max_ppl_increase is not None:  # a trial may be nearly as large as the model, and merges its parts too
        found["trials"] = plan.whole_bytes + min(plan.whole_bytes, max(plan.max_shard_bytes, plan.largest_part))
    return {kind: nbytes for kind, nbytes in found.items() if nbytes}


def _by_layer(view: ModelView) -> Mapping[int, list[Target]]:
    found: dict[int, list[Target]] = defaultdict(list)
    for target in view.targets:
        found[target.layer].append(target)
    return found


def _forward_bytes(targets: list[Target], needs: Mapping[str, frozenset[str]]) -> int:
    """Of one layer's file of statistics; of a symmetric matrix it holds one half."""
    ahead = {target.name: needs.get(target.name, frozenset()) & FORWARD_NEEDS for target in targets}
    return wanted(targets, ahead).nbytes(targets, stored=True)


def _backward_bytes(target: Target, needs: frozenset[str]) -> int:
    out = target.out_features
    gram = 2 * out * (out + 1) if "grad_gram" in needs else 0
    return gram + (4 * target.numel if "weight_grad" in needs else 0) + (4 * target.in_features if "fisher_in" in needs else 0)


def _measured(plan: Planned, options: int) -> int:
    exact = plan.recipe.allocation == "own" or (plan.recipe.rule is not None and plan.recipe.rule.score != "")
    return options if exact else min(options, _THINNED * max(1, len(plan.recipe.alternatives)))
