"""What will happen: every target's form and bytes, what stays and why, and the memory that it takes.

A plan is a value, made from the configuration and the files' headers before anything runs. `identity` is what a resumed run
must agree with; the estimates are for people.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from . import amount
from .allocation import allocate
from .amount import Footprint, Found
from .budget import uniform
from .calibrate.stats import Wanted, wanted
from .compress.base import FORWARD_NEEDS, Choice, Curve, Offer, Shape
from .depth.spec import how_many
from .depth_cost import depth_bytes, depth_lines
from .errors import RecipeError
from .items import Item, items_of, offers_of, shape_of
from .limits import bounds_of, even, matches, unmatched, within
from .model import Kept, ModelView
from .parts import enough_branches, open_branches
from .recipe import Recipe
from .surgery import Surgery
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
    depth: int = 0

    @property
    def peak(self) -> int:
        """The largest moment: embedding the tokens, a layer's forward, solving its largest target, a refinement, or depth."""
        embedding = self.outside + self.activations
        forward = self.layer + self.activations + self.statistics + self.forward
        solve = self.layer + self.activations + self.statistics + self.solve + self.factors
        block = self.layer + self.activations + self.blocks if self.blocks else 0
        return self.process + max(embedding, forward, solve, block, self.whole, self.depth)


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
        dropped_beside: bytes of what is no target in them, less what a repair adds.
        left_out: what the checkpoint holds and the model has no place for.
        items: the targets that may be compressed, those that are solved together as one.
        surgery: halves of layers that go, and repairs.
        notes: what depth will take, in words.
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
    items: tuple[Item, ...] = ()
    surgery: Surgery = field(default_factory=Surgery)
    notes: tuple[str, ...] = ()
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
        method = self.recipe.compression[0]
        joined = {target.name for item in self.items if item.parts is not None for target in item.targets}
        joint_needs = method.joint.needs if method.joint else frozenset()
        return wanted(self.solved(layer), method.needs & FORWARD_NEEDS, joined, joint_needs)

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
    surgery: Surgery | None = None,
    found: Found | None = None,
) -> Plan:
    """Resolve a recipe against a model.

    Args:
        surgery: what goes and what is changed, once the recipe's score has chosen; until then the plan assumes the last ones.
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
    shapes = {t.name: shape_of(t, element) for t in view.targets}
    nbytes = {name: shape.nbytes for name, shape in shapes.items()}
    surgery = assumed(view, recipe) if surgery is None else surgery
    gone, zeroed = surgery.dropped, {target.name for target in surgery.zeroed}
    leaving = {target.name for target in view.targets if target.layer in gone or target.name in zeroed}
    items = items_of(method, settings, [t for t in view.targets if t.name not in kept_dense and t.name not in leaving])
    known = offers_of(items, method, settings, recipe.rank_multiple, element)
    known |= {name: within(name, bounds[name], shapes[name], ways) for name, ways in known.items() if name in bounds}
    kept_dense |= {name: bounds[name].why_min for name, ways in known.items() if name in bounds and not ways}
    items = [item for item in items if item.name not in kept_dense]
    bounded = frozenset(item.name for item in items if item.name in bounds and not bounds[item.name].may_be_dense)
    dense = {item.name: sum(nbytes[target.name] for target in item.targets) for item in items}
    beside = (
        sum(view.layer_nbytes(layer) for layer in gone) - sum(nbytes[name] for name in leaving - zeroed)
        + element * (sum(target.out_features for target in surgery.zeroed if target.bias) - surgery.added)
    )  # fmt: skip
    footprint = _footprint(view, shapes, leaving, beside, kept_dense.keys() - leaving)
    amounts = recipe.amounts
    if recipe.max_ppl_increase is not None:
        amounts["ratio"] = amount.ASSUMED if found is None else found.ratio
    gap = None
    if curves is None:
        offers = {name: (whole, known[name]) for name, whole in dense.items()}
        if recipe.allocation == "own":
            per_item = {name: ways[-1] if ways else Offer(Choice(), whole) for name, (whole, ways) in offers.items()}
        elif recipe.limits:
            per_item = _even(offers, bounded, amounts, footprint)
        else:
            per_item = uniform(offers, _share(amounts, footprint))
    else:
        open_targets = {target.name for item in items for target in item.targets}
        kept_bytes = {name: size for name, size in nbytes.items() if name not in open_targets}
        budget = amount.targets_bytes(amounts, footprint)
        shared = allocate(recipe, kept_bytes | dense, curves, budget, view.targets, bounded)
        per_item, gap = shared.offers, shared.gap
    chosen: dict[str, Offer] = {}
    for item in items:
        chosen |= item.shared_out(per_item[item.name], known[item.name], nbytes)
    steps = []
    for target in view.targets:
        before = shapes[target.name].nbytes
        if target.name in leaving:
            why = "its half of the layer is dropped" if target.name in zeroed else "its layer is dropped"
            steps.append(Step(target, Choice(), before, 0, why))
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
        beside,
        tuple(view.left_out),
        tuple(items),
        surgery,
        depth_lines(view, recipe, surgery),
        gap,
        found,
    )  # fmt: skip
    return Plan(**{**plan.__dict__, "memory": predict_memory(view, plan, devices)})


def assumed(view: ModelView, recipe: Recipe) -> Surgery:
    """As many of the last open layers, or halves of layers, as the recipe drops, before its score has said which."""
    spec = recipe.dropping
    if spec is None:
        return Surgery()
    if spec.granularity == "layer":
        end = len(view.layers) - spec.protect_last
        return Surgery(tuple(range(end - how_many(spec, len(view.layers)), end)))
    gone: list[int] = []
    parts, enough = open_branches(view.branches, len(view.layers), spec), enough_branches(view.branches, spec)
    while not enough(gone):
        gone.append(parts.pop())
    chosen = [view.branches[part] for part in sorted(gone)]
    return Surgery((), tuple(each.name for each in chosen), tuple(target for each in chosen for target in each.targets))


def _counted(view: ModelView, recipe: Recipe) -> Recipe:
    """The recipe with a number of layers where it says by bits or by a size how many shall go.

    As many as are enough whichever the score will choose: the smallest ones are counted.
    """
    if recipe.depth is None or recipe.depth.drop is not None or recipe.depth.ratio is not None:
        return recipe
    if recipe.bits is None and recipe.size is None:
        return recipe
    element = torch.empty((), dtype=view.dtype).element_size()
    shapes = {target.name: shape_of(target, element) for target in view.targets}
    first, last = recipe.depth.protect_first, len(view.layers) - recipe.depth.protect_last
    footprint = _footprint(view, shapes, (), 0, ())
    if recipe.depth.granularity != "layer":  # halves are counted by the bytes of their targets
        excess = footprint.targets - (amount.targets_bytes(recipe.amounts, footprint) or 0)
        ratio = min(1.0, max(excess, 0) / footprint.targets)
        return recipe.model_copy(update={"depth": recipe.depth.model_copy(update={"ratio": ratio})})
    if recipe.size is not None:  # whole layers go, what is no target in them too
        sizes = sorted(view.layer_nbytes(layer) for layer in range(first, last))
        excess = footprint.whole + footprint.headers - (recipe.amounts["size"] or 0)
    else:
        of_layer = [sum(shapes[t.name].nbytes for t in view.targets if t.layer == layer) for layer in range(first, last)]
        sizes, excess = sorted(of_layer), footprint.targets - (amount.targets_bytes(recipe.amounts, footprint) or 0)
    count = next((n for n in range(1, len(sizes) + 1) if sum(sizes[:n]) >= excess), len(sizes) + 1)
    return recipe.model_copy(update={"depth": recipe.depth.model_copy(update={"drop": count})})


def _footprint(
    view: ModelView, shapes: Mapping[str, Shape], leaving: Collection[str], beside: int, kept: Collection[str]
) -> Footprint:
    """What the model's bytes consist of.

    Args:
        leaving: targets that are dropped.
        beside: bytes of what goes with them.
        kept: targets that stay dense.
    """
    tensors = dict.fromkeys((name for name, _ in view.model.named_parameters()), False) | dict.fromkeys(shapes, True)
    gone = sum(shapes[name].nbytes for name in leaving)
    return Footprint(
        sum(shape.nbytes for shape in shapes.values()),
        sum(shape.out_features * shape.in_features for shape in shapes.values()),
        torch.empty((), dtype=view.dtype).element_size(),
        view.nbytes,
        gone + beside,
        gone,
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
    offers: Mapping[str, tuple[int, Sequence[Offer]]], bounded: frozenset[str], amounts: Mapping[str, Any], footprint: Footprint
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
    dense = {step.target.name for step in plan.steps if step.choice.dense}
    solve = max((_solve_bytes([t for t in item.targets if t.name not in dense]) for item in plan.items), default=0)
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
        depth=depth_bytes(view, plan.recipe, plan.surgery),
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


def _solve_bytes(targets: Sequence[Target]) -> int:
    """Workspace of one item in float64: about four copies of the weights and six of the smaller side's square."""
    if not targets:
        return 0
    small = min(sum(target.out_features for target in targets), max(target.in_features for target in targets))
    return 8 * (4 * sum(target.numel for target in targets) + 6 * small**2)
