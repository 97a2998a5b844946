"""What will happen: every target's form and bytes, what stays and why, and the memory that it takes.

A plan is a value, made from the configuration and the files' headers before anything runs. `identity` is what a resumed run
must agree with; the estimates are for people.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from . import amount
from .allocation import allocate
from .amount import Footprint, Found
from .budget import uniform
from .calibrate.stats import Wanted, wanted
from .compress.base import FORWARD_NEEDS, Choice, Curve, Offer, Shape
from .errors import RecipeError
from .limits import bounds_of, even, matches, unmatched, within
from .model import Kept, ModelView
from .recipe import Recipe, how_many
from .targets import Target

TOKENS_PER_BATCH = 2048  # of calibration that go through a layer at once, unless one sample is longer


@dataclass(frozen=True)
class Step:
    """One target and what becomes of it."""

    target: Target
    choice: Choice
    bytes_before: int
    bytes_after: int
    why_dense: str = ""
    kept: bool = False


@dataclass(frozen=True)
class Memory:
    """Predicted peak of resident memory in bytes, by part; docs/memory.md states the formula."""

    process: int
    outside: int
    layer: int
    activations: int
    statistics: int
    forward: int
    solve: int
    factors: int
    blocks: int = 0
    whole: int = 0

    @property
    def peak(self) -> int:
        """The largest moment: embedding the tokens, a layer's forward, solving its largest target, or a refinement."""
        embedding = self.outside + self.activations
        forward = self.layer + self.activations + self.statistics + self.forward
        solve = self.layer + self.activations + self.statistics + self.solve + self.factors
        block = self.layer + self.activations + self.blocks if self.blocks else 0
        return self.process + max(embedding, forward, solve, block, self.whole)


@dataclass(frozen=True)
class Plan:
    """A resolved compression.

    Args:
        recipe: with every default filled in.
        steps: one per target, in the order in which a forward reaches them.
        kept: everything that is not a target, with reasons.
        dtype: of the stored tensors.
        model: name, fingerprint of the files, configuration hash.
        whole_bytes: the model's bytes before (tied tensors counted once).
        whole_numel: its parameters before.
        batch: calibration samples that go through a layer at once.
        memory: the prediction.
        layers: of the original model.
        dropped: layers that go.
        dropped_beside: bytes of what is no target in them.
        left_out: what the checkpoint holds and the model has no place for.
        gap: how far the predicted loss may be from the best possible, relative to it; None where no solver was asked.
        found: what the search for a size has found; None where the recipe says the size, and before the search.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    kept: tuple[Kept, ...]
    dtype: torch.dtype
    model: dict[str, Any]
    whole_bytes: int
    whole_numel: int
    batch: int
    memory: Memory
    layers: int
    dropped: tuple[int, ...] = ()
    dropped_beside: int = 0
    left_out: tuple[Kept, ...] = ()
    gap: float | None = None
    found: Found | None = None

    @property
    def renumbered(self) -> dict[int, int]:
        """Layer of the original -> its number in the result, for those that stay."""
        stay = [layer for layer in range(self.layers) if layer not in self.dropped]
        return {old: new for new, old in enumerate(stay)}

    @property
    def targets_before(self) -> int:
        return sum(step.bytes_before for step in self.steps)

    @property
    def targets_after(self) -> int:
        return sum(step.bytes_after for step in self.steps)

    @property
    def ratio(self) -> float:
        """Fraction of the targets' bytes that is removed."""
        return 1 - self.targets_after / self.targets_before

    @property
    def whole_after(self) -> int:
        return self.whole_bytes - self.targets_before + self.targets_after - self.dropped_beside

    @property
    def whole_ratio(self) -> float:
        """Fraction of the whole model's bytes that is removed."""
        return 1 - self.whole_after / self.whole_bytes

    def layer_steps(self, layer: int) -> list[Step]:
        return [step for step in self.steps if step.target.layer == layer]

    def solved(self, layer: int) -> list[Target]:
        """The targets of a layer that are not left dense."""
        return [step.target for step in self.layer_steps(layer) if not step.choice.dense]

    def wanted(self, layer: int) -> Wanted:
        """The statistics to collect in a layer: those of the targets that are not left dense."""
        return wanted(self.solved(layer), self.recipe.compression[0].needs & FORWARD_NEEDS)

    def identity(self, calibration_hash: str) -> dict[str, Any]:
        """What a run is of; equal identities give equal bytes on one machine."""
        recipe = self.recipe.resolved()
        recipe["calibration"] |= {"tokens": calibration_hash}
        return {
            "recipe": recipe,
            "model": {key: value for key, value in self.model.items() if key != "name"},
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
        }


def make_plan(
    view: ModelView,
    recipe: Recipe,
    devices: int = 1,
    curves: Mapping[str, Curve] | None = None,
    dropped: tuple[int, ...] | None = None,
    found: Found | None = None,
) -> Plan:
    """Resolve a recipe against a model.

    Args:
        dropped: the layers that go, once the recipe's score has chosen them; until then the plan assumes the last ones.
        curves: what each target loses at each offer, from the survey; without them the budget is shared out evenly, and where
            the method itself decides (`allocation: own`) every target is taken to be as large as it may become.
        found: the ratio that a search has found for a recipe that says how far perplexity may rise; until then a plan assumes
            `amount.ASSUMED`.

    Raises:
        BudgetError: no ratio, or one that cannot be met.
        RecipeError: a pattern of `keep` or `limits` matches no target, or limits contradict each other.
    """
    recipe = _counted(view, recipe)
    element = torch.empty((), dtype=view.dtype).element_size()
    kept_dense = _kept_dense(view.targets, recipe.keep, len(view.layers))
    bounds = bounds_of(view.targets, recipe.limits, len(view.layers))
    kept_dense |= {name: each.why_min for name, each in bounds.items() if each.dense and name not in kept_dense}
    method, settings = recipe.compression
    shapes = {t.name: Shape(t.out_features, t.in_features, element, t.bias) for t in view.targets}
    known: dict[Shape, list[Offer]] = {}
    for name, shape in shapes.items():
        if name not in kept_dense and shape not in known:
            known[shape] = method.offers(shape, settings, recipe.rank_multiple)
    gone = _assumed(view, recipe) if dropped is None else dropped
    leaving = {target.name for target in view.targets if target.layer in gone}
    open_targets = [name for name in shapes if name not in kept_dense and name not in leaving]
    offers = {n: (shapes[n].nbytes, within(n, bounds.get(n), shapes[n], known[shapes[n]])) for n in open_targets}
    tight = [name for name, (_, ways) in offers.items() if name in bounds and not ways]  # and so dense, by a floor
    kept_dense |= {name: bounds[name].why_min for name in tight}
    offers = {name: each for name, each in offers.items() if name not in kept_dense}
    bounded = frozenset(name for name in offers if name in bounds and not bounds[name].may_be_dense)
    footprint = _footprint(view, shapes, gone, kept_dense.keys() - leaving)
    amounts = recipe.amounts
    if recipe.max_ppl_increase is not None:
        amounts["ratio"] = amount.ASSUMED if found is None else found.ratio
    gap = None
    if curves is None:
        if recipe.allocation == "own":
            chosen = {name: ways[-1] if ways else Offer(Choice(), dense) for name, (dense, ways) in offers.items()}
        elif recipe.limits:
            chosen = _even(offers, bounded, amounts, footprint)
        else:
            chosen = uniform(offers, _share(amounts, footprint))
    else:
        budget = amount.targets_bytes(amounts, footprint)
        shared = allocate(recipe, {n: s.nbytes for n, s in shapes.items()}, curves, budget, view.targets, bounded)
        chosen, gap = shared.offers, shared.gap
    steps = []
    for target in view.targets:
        before = shapes[target.name].nbytes
        if target.name in leaving:
            steps.append(Step(target, Choice(), before, 0, "its layer is dropped"))
            continue
        offer = chosen.get(target.name, Offer(Choice(), before))
        steps.append(
            Step(
                target,
                offer.choice,
                before,
                offer.nbytes,
                _why_dense(target, offer.choice, kept_dense),
                target.name in kept_dense,
            )
        )
    batch = max(1, TOKENS_PER_BATCH // recipe.calibration.length)
    plan = Plan(
        recipe, tuple(steps), tuple(view.kept), view.dtype, _identify(view), view.nbytes, view.numel, batch,
        Memory(0, 0, 0, 0, 0, 0, 0, 0), len(view.layers), gone,
        sum(view.layer_nbytes(layer) for layer in gone) - sum(shapes[name].nbytes for name in leaving),
        tuple(view.left_out), gap, found,
    )  # fmt: skip
    return Plan(**{**plan.__dict__, "memory": predict_memory(view, plan, devices)})


def _assumed(view: ModelView, recipe: Recipe) -> tuple[int, ...]:
    """As many layers as the recipe drops, before its score has said which."""
    spec = recipe.dropping
    if spec is None:
        return ()
    end = len(view.layers) - spec.protect_last
    return tuple(range(end - how_many(spec, len(view.layers)), end))


def _counted(view: ModelView, recipe: Recipe) -> Recipe:
    """The recipe with a number of layers where it says by bits or by a size how many shall go.

    As many as are enough whichever the score will choose: the smallest ones are counted.
    """
    if recipe.depth is None or recipe.depth.drop is not None or recipe.depth.ratio is not None:
        return recipe
    if recipe.bits is None and recipe.size is None:
        return recipe
    element = torch.empty((), dtype=view.dtype).element_size()
    of_layer = [0] * len(view.layers)
    for target in view.targets:
        of_layer[target.layer] += target.numel * element
    first, last = recipe.depth.protect_first, len(view.layers) - recipe.depth.protect_last
    footprint = _footprint(view, {t.name: Shape(t.out_features, t.in_features, element, t.bias) for t in view.targets}, (), ())
    if recipe.size is not None:  # whole layers go, what is no target in them too
        sizes = sorted(view.layer_nbytes(layer) for layer in range(first, last))
        excess = footprint.whole + footprint.headers - (recipe.amounts["size"] or 0)
    else:
        sizes, excess = sorted(of_layer[first:last]), footprint.targets - (amount.targets_bytes(recipe.amounts, footprint) or 0)
    count = next((n for n in range(1, len(sizes) + 1) if sum(sizes[:n]) >= excess), len(sizes) + 1)
    return recipe.model_copy(update={"depth": recipe.depth.model_copy(update={"drop": count})})


def _footprint(view: ModelView, shapes: Mapping[str, Shape], gone: Collection[int], kept: Collection[str]) -> Footprint:
    """What the model's bytes consist of; `gone` are layers that are dropped, `kept` targets that stay dense."""
    layer_of = {target.name: target.layer for target in view.targets}
    tensors = dict.fromkeys((name for name, _ in view.model.named_parameters()), False) | dict.fromkeys(shapes, True)
    return Footprint(
        sum(shape.nbytes for shape in shapes.values()),
        sum(shape.out_features * shape.in_features for shape in shapes.values()),
        torch.empty((), dtype=view.dtype).element_size(),
        view.nbytes,
        sum(view.layer_nbytes(layer) for layer in gone),
        sum(shape.nbytes for name, shape in shapes.items() if layer_of[name] in gone),
        sum(shapes[name].nbytes for name in kept),
        amount.header_bytes(tensors, len(view.layers) + len(view.outside_parts())),
    )


def _share(amounts: Mapping[str, Any], footprint: Footprint) -> float | None:
    """The fraction of its bytes that every open target loses, so that all steps together meet the recipe's budget.

    A ratio is that of every target that is not kept, as published; bits and sizes hold for all targets together.
    """
    ratio: float | None = amounts["ratio"]
    if ratio is not None:
        stay = footprint.targets - footprint.gone_targets
        return max(0.0, 1 - (1 - ratio) * footprint.targets / stay) if footprint.gone_targets else ratio
    budget = amount.targets_bytes(amounts, footprint)
    return None if budget is None else amount.share_of(budget, footprint)


def _even(
    offers: Mapping[str, tuple[int, list[Offer]]], bounded: frozenset[str], amounts: Mapping[str, Any], footprint: Footprint
) -> dict[str, Offer]:
    """An even share inside limits; with no budget, each target as large as its limits let it."""
    share = _share(amounts, footprint)
    budget = None if share is None else int((1 - share) * footprint.open + 1e-6)
    found = even(offers, offers.keys() - bounded, budget)
    return {name: offer or Offer(Choice(), offers[name][0]) for name, offer in found.items()}


def _kept_dense(targets: list[Target], patterns: tuple[str, ...], layers: int) -> dict[str, str]:
    """Target -> the pattern that keeps it; patterns match full names and roles."""
    found: dict[str, str] = {}
    problems = []
    for pattern in patterns:
        hits = [target.name for target in targets if matches(target, pattern, layers)]
        if not hits:
            problems.append(unmatched("keep", pattern, targets))
        found.update(dict.fromkeys(hits, pattern))
    if problems:
        raise RecipeError("recipe", problems)
    return found


def _why_dense(target: Target, choice: Choice, kept: dict[str, str]) -> str:
    if target.name in kept:
        return f"kept by '{kept[target.name]}'"
    if choice.dense:
        return "nothing that the method offers is smaller, or the budget leaves it whole"
    return ""


def _identify(view: ModelView) -> dict[str, Any]:
    config = json.loads(view.config.to_json_string())
    config.pop("transformers_version", None)  # a newer transformers does not make it another model
    return {
        "name": view.location.name,
        "type": view.config.model_type,
        "fingerprint": view.source.fingerprint(),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
    }


def predict_memory(view: ModelView, plan: Plan, devices: int = 1) -> Memory:
    """Predict the peak of resident memory; the formula stands in docs/memory.md, each term with its reason."""
    element = torch.empty((), dtype=view.dtype).element_size()
    calibration = plan.recipe.calibration
    text = view.config.get_text_config()
    read = calibration.samples * calibration.length if plan.recipe.reads_text else 0
    hidden = read * text.hidden_size * element
    by_layer: dict[int, list[Step]] = defaultdict(list)
    for step in plan.steps:
        by_layer[step.target.layer].append(step)
    weights = max(view.layer_nbytes(layer) for layer in range(len(view.layers)))
    statistics = max(
        (plan.wanted(layer).nbytes(s.target for s in steps if not s.choice.dense) for layer, steps in by_layer.items()),
        default=0,
    )
    widest = max((max(s.target.out_features, s.target.in_features) for s in plan.steps), default=0)
    tokens = plan.batch * calibration.length if plan.recipe.reads_text else 0
    solve = max((_solve_bytes(s.target) for s in plan.steps if not s.choice.dense), default=0)
    refine = plan.recipe.refine
    both = plan.recipe.correction is not None or (refine is not None and refine.block is not None)
    if both:  # two streams of everything, and the windows that are held out
        hidden = 2 * hidden * (calibration.samples + calibration.held_out) // calibration.samples
    return Memory(
        process=psutil.Process().memory_info().rss,
        outside=view.outside_nbytes(for_calibration=True),
        layer=weights,
        activations=3 * hidden,
        statistics=2 * statistics * devices,
        forward=tokens * widest * (2 * element + 8),
        solve=solve,
        factors=max((sum(s.bytes_after for s in steps if not s.choice.dense) for steps in by_layer.values()), default=0),
        blocks=max(map(_trained_bytes, by_layer.values()), default=0) + weights + tokens * _graph(view, plan) if both else 0,
        whole=_whole_bytes(view, plan),
    )


def _trained_bytes(steps: Iterable[Step]) -> int:
    """Gradient, two moments, a float32 master and the best values of the numbers that forms train: at most what they store."""
    return 20 * sum(_trained(step) for step in steps)


def _trained(step: Step) -> int:
    """Numbers of a form that gradients reach: all of a factor's, and of a quantized matrix the steps of its groups."""
    numbers = step.bytes_after * step.target.numel // step.bytes_before
    return 0 if step.choice.dense else numbers // 8 if step.choice.bits is not None else numbers


def _graph(view: ModelView, plan: Plan) -> int:
    """Bytes that autograd keeps of a token in one layer: what its matrices read and put out, twice for what lies between."""
    widths = [s.target.in_features + s.target.out_features for s in plan.steps if s.target.layer == plan.steps[0].target.layer]
    return 2 * 4 * sum(widths)


def _whole_bytes(view: ModelView, plan: Plan) -> int:
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


def _solve_bytes(target: Target) -> int:
    """Workspace of one target in float64: about four copies of the weight and six of the smaller side's square."""
    small = min(target.out_features, target.in_features)
    return 8 * (4 * target.numel + 6 * small**2)
