"""Choosing the layers or sub-layers to remove: a score is evaluated on the original model with a few calibration tokens.

The choice is in the plan. All later steps work on the model without them: statistics of the remaining layers are taken without
the removed ones, and the artifact's layers are renumbered (run/run.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.layerwise import run_batches, through_layers
from ..calibrate.packing import token_hash
from ..checkpoint.atomic import read_json, write_json
from ..model.ablation import Ablation, WithoutSubLayers, divergences, losses
from ..model.events import Event, Notify, silent
from ..model.lockstep import Call, hidden_of
from ..model.sublayers import SubLayer
from ..model.view import ModelView
from .base import MayGo, anything, get_score
from .candidates import Removable, enough_sublayers, open_sublayers
from .cost import seen_samples
from .model_edit import ModelEdit
from .spec import DepthSpec


def choose_removed(
    view: ModelView,
    spec: DepthSpec,
    tokens: Tensor,
    devices: Sequence[torch.device],
    folder: Path,
    notify: Notify = silent,
) -> ModelEdit:
    """The model edit that removes the chosen layers or sub-layers; repairs come later (depth/repair.py).

    Args:
        tokens: (samples, length) calibration tokens; the score uses some of them.
        folder: keeps the loss of every model that was measured; an interrupted search, or one that removes more, reads it.
        notify: is told of each round of a greedy score.
    """
    score = get_score(spec.score)
    if spec.granularity == "sub-layer":
        candidates = open_sublayers(view.sublayers, len(view.layers), spec)
        trial = _Trying(view, spec, tokens, devices[0], view.sublayers, folder, notify)
        removed = score.choose(trial, candidates, enough_sublayers(view.sublayers, spec))
        return ModelEdit.without([view.sublayers[number] for number in removed], trial.record)
    removable, record = Removable(view, spec), dict[str, Any]()
    if score.tries:
        trial = _Trying(view, spec, tokens, devices[0], None, folder, notify)
        trial.may_go = removable.may_go
        chosen = score.choose(trial, removable.open, lambda removed: len(removed) >= removable.count)
        record = trial.record
    else:
        boundaries: list[Tensor] = []
        if score.looks:
            shown = seen_samples(score, view.config.get_text_config().hidden_size, *tokens.shape)
            boundaries = _boundaries(view, spread(tokens, shown), devices)
        chosen = score.choose(boundaries, removable.open, removable.count, removable.may_go)
    together = removable.completed(chosen)  # the chosen ones, unless the choice came to an end before it was complete
    return ModelEdit(removable.assumed if together is None else tuple(sorted(together)), record=record)


class _Trying:
    """Measures the model without sets of candidates, and records the best set of each round.

    A set that cannot go is not measured; its loss is infinite.
    """

    def __init__(
        self,
        view: ModelView,
        spec: DepthSpec,
        tokens: Tensor,
        device: torch.device,
        sublayers: Sequence[SubLayer] | None,
        folder: Path,
        notify: Notify,
    ) -> None:
        self._view, self._device, self._notify = view, device, notify
        self.may_go: MayGo = anything  # which sets can go, alone or with others
        self._without = Ablation if sublayers is None else WithoutSubLayers(sublayers)
        self._tokens = spread(tokens, spec.loss_samples)[:, : spec.loss_length]
        self._looks = get_score(spec.score).looks
        self.record: dict[str, Any] = {"score": {"looks": self._looks, "tokens": self._tokens.numel(), "rounds": []}}
        of = [view.fingerprint(), token_hash(self._tokens), str(view.dtype), self._looks]
        of += ["layers"] if sublayers is None else [sublayer.name for sublayer in sublayers]
        self._file = folder / f"{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]}.json"
        self._known: dict[str, float] = read_json(self._file, dict[str, float]) or {}

    def __call__(self, sets: Sequence[frozenset[int]]) -> list[float]:
        started = time.perf_counter()
        keys = [",".join(map(str, sorted(removed))) for removed in sets]
        open_sets = {key: removed for key, removed in zip(keys, sets, strict=True) if self.may_go(removed)}
        if not open_sets:
            return [math.inf] * len(sets)
        missing = {key: removed for key, removed in open_sets.items() if key not in self._known}
        if missing:
            measure = losses if self._looks == "loss" else divergences
            ablations = [self._without(removed) for removed in missing.values()]
            measured = measure(self._view, self._tokens, ablations, self._device)
            self._known |= dict(zip(missing, measured, strict=True))
            write_json(self._file, self._known)
        found = [self._known[key] if key in open_sets else math.inf for key in keys]
        best = min(range(len(found)), key=found.__getitem__)
        self.record["score"]["rounds"].append({"gone": sorted(sets[best]), self._looks: found[best]})
        line = f"{len(sets[best])} gone, {self._looks} {found[best]:.4f} nats per token"
        self._notify(Event(line, seconds=time.perf_counter() - started))
        return found


def spread(tokens: Tensor, samples: int) -> Tensor:
    """At most this many of the samples (samples, length), evenly spread."""
    samples = max(1, min(len(tokens), samples))
    return tokens[[number * len(tokens) // samples for number in range(samples)]]


def _boundaries(view: ModelView, tokens: Tensor, devices: Sequence[torch.device]) -> list[Tensor]:
    """Hidden states (samples, length, hidden) before the first layer and after every layer, in the model's dtype."""
    found: list[Tensor] = []

    def visit(index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any]:
        if not found:
            found.append(torch.cat([call.hidden.cpu() for call in calls]))
        outputs = run_batches(layer, name, calls, devices)[0]
        found.append(torch.cat([hidden_of(output) for output in outputs]))
        return outputs

    with torch.no_grad():
        through_layers(view, tokens.split(1), visit)
    return found
