"""How long one layer takes: to be read, and to run forward with and without statistics, over a batch of tokens.

The first layer of the model runs over random tokens. Where a whole batch would take more than about a second, shorter ones are
measured, and the time of a batch is a line through the two longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...calibrate.layerwise import run_batches, run_in_chunks
from ...calibrate.stats import chunks_of, wanted
from ...model.ablation import SKIP
from ...model.divergence import Predictions
from ...model.layerwise import layerwise
from ...model.lockstep import Call
from ...model.view import ModelView
from ...plan.plan import PROBED, Planned
from .clock import Stopwatch

_FIRST, _TIMES = 64, 8  # tokens of the shortest batch, and how many times as long the next one is
_HEAD = 1 << 26  # numbers of the output head that are measured, at most
_EVALUATED = 128  # tokens whose logits are measured


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer.

    Args:
        load: to read its weights.
        plain: to run forward over one batch.
        observed: to run forward over one batch and collect the statistics of the recipe.
        mirror: to finish the statistics, once for all batches.
        per_token: of a forward over one batch, per token.
        tokens: of the longest batch that was measured.
        probe: one variant of a probe, in float32; 0 where nothing is probed.
        compared: the logits of a variant and their divergence; 0 where nothing is probed.
        head: of the logits and their logarithms, per token; 0 where nothing is evaluated.
    """

    load: float
    plain: float
    observed: float
    mirror: float
    per_token: float
    tokens: int
    probe: float = 0.0
    compared: float = 0.0
    head: float = 0.0


@torch.no_grad()
def time_layer(view: ModelView, plan: Planned, watch: Stopwatch) -> LayerTime:
    """Measure the first layer of a model whose weights are not in memory; they are not afterwards.

    Raises:
        CheckpointError, NonFiniteError: as for `ModelView.load`.
    """
    full = plan.batch * plan.recipe.calibration.length
    batches = _batches(view, plan)
    with layerwise(view, batches) as forward:
        turn = next(iter(forward))
        calls = turn.calls
        loaded: list[Any] = []
        with turn.loaded(watch.device):
            pass
        load = watch.seconds(lambda: loaded.append(view.load(turn.name)))
        layer: nn.Module = loaded[0].to(watch.device)

        def plainly(call: Call) -> None:
            run_batches(layer, turn.name, [call], [watch.device])

        # a first layer that stays dense stands for those that do not
        targets = plan.solved(0) or [step.target for step in plan.layer_steps(0)]
        what = wanted(targets, plan.needs)
        chunks = chunks_of(targets, what.nbytes)

        def observe(some: Sequence[Call]) -> None:
            run_in_chunks(layer, turn.name, some, [watch.device], chunks, what, lambda stats: None)

        sizes = [_tokens(call) for call in calls]
        plain = watch.rising(calls, plainly, sizes)
        seen = plain
        if any(what.inputs.values()) or what.outputs:
            seen = watch.rising(calls, lambda call: observe([call]), sizes)
        mirror = 0.0
        if seen is not plain:
            small = max(0, len(seen) - 2)
            (twice,) = watch.rising([calls[small]], lambda call: observe([call, call]))
            mirror = max(0.0, 2 * seen[small] - twice)
        of_one = [max(0.3 * seconds, seconds - mirror) for seconds in seen]
        found = LayerTime(
            load=load,
            plain=_at(full, calls, plain),
            observed=_at(full, calls, of_one),
            mirror=mirror,
            per_token=_at(full, calls, plain) / full,
            tokens=int(_tokens(calls[min(len(plain), len(seen)) - 1])),
        )
        view.unload(turn.name)
    return found


def time_head(view: ModelView, found: LayerTime, watch: Stopwatch) -> LayerTime:
    """Measure the output head, too, as an evaluation takes it; on a part of the vocabulary where that is large."""
    head, times = _part_of_head(view, watch.device)
    states = torch.randn(_EVALUATED, head.shape[1], device=watch.device)
    (seconds,) = watch.rising([states], lambda some: (some @ head.T).log_softmax(-1))
    return replace(found, head=seconds * times / _EVALUATED)


def time_probe(view: ModelView, found: LayerTime, watch: Stopwatch) -> LayerTime:
    """Measure a variant of a probe, too: a layer in float32 over few tokens, and the divergence at the end.

    Args:
        view: the model in float32 (`ModelView.widened`).
        found: what is known of the layer.
    """
    text = view.config.get_text_config()
    ids = _random(PROBED[0], min(PROBED[1], getattr(text, "max_position_embeddings", None) or PROBED[1]), text.vocab_size)
    with torch.no_grad(), layerwise(view, [ids[:1, :_FIRST], ids]) as forward:
        turn = next(iter(forward))
        with turn.loaded(watch.device) as layer:
            seconds = watch.rising(turn.calls, lambda call: run_batches(layer, turn.name, [call], [watch.device]))
            probe = _at(ids.numel(), turn.calls, seconds)
    rows = ids.numel() - SKIP * len(ids) if ids.shape[1] > 2 * SKIP else ids.numel()
    head, times = _part_of_head(view, watch.device)
    states = torch.randn(1, rows, head.shape[1], device=watch.device)
    original = Predictions(states @ head.T)
    (of_part,) = watch.rising([states], lambda some: original.divergence(some @ head.T))
    return replace(found, probe=probe, compared=of_part * times)


def _part_of_head(view: ModelView, device: torch.device) -> tuple[Tensor, float]:
    """Random rows (words, hidden) of an output head, and how many times as many the model's has."""
    text = view.config.get_text_config()
    words = min(_HEAD // text.hidden_size, text.vocab_size)
    return torch.randn(words, text.hidden_size, device=device), text.vocab_size / words


def _batches(view: ModelView, plan: Planned) -> list[Tensor]:
    """Random tokens from a short batch to one as long as those of the run."""
    text = view.config.get_text_config()
    length, words = plan.recipe.calibration.length, text.vocab_size
    if positions := getattr(text, "max_position_embeddings", None):  # a recipe without text leaves its length as it is
        length = min(length, positions)
    sizes = [(1, min(length, _FIRST))]
    while sizes[-1][1] < length:
        sizes.append((1, min(length, _TIMES * sizes[-1][1])))
    if plan.batch > 1:
        sizes.append((plan.batch, length))
    return [_random(samples, tokens, words) for samples, tokens in sizes]


def _random(samples: int, length: int, words: int) -> Tensor:
    return torch.randint(words, (samples, length), generator=torch.Generator().manual_seed(0))


def _tokens(call: Call) -> float:
    return float(call.hidden.shape[0] * call.hidden.shape[1])


def _at(full: int, calls: Sequence[Call], seconds: Sequence[float]) -> float:
    """Seconds of a batch of `full` tokens: measured, or on the line through the two longest batches that were measured."""
    sizes = [_tokens(call) for call in calls[: len(seconds)]]
    if sizes[-1] >= full or len(sizes) < 2:
        return seconds[-1] * full / sizes[-1]
    each = max(0.0, seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    return seconds[-1] + (each or seconds[-1] / sizes[-1]) * (full - sizes[-1])
