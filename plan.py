"""What will happen: every target's form and bytes, what stays and why, and the memory that it takes.

A plan is a value, made from the configuration and the files' headers before anything runs. `identity` is what a resumed run
must agree with; the estimates are for people.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from .allocation import allocate
from .budget import uniform
from .calibrate.stats import Wanted, wanted
from .compress.base import FORWARD_NEEDS, Choice, Curve, Offer, Shape
from .depth.spec import how_many
from .depth_cost import depth_bytes, depth_lines
from .errors import RecipeError, did_you_mean
from .items import Item, items_of, offers_of, shape_of
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
) -> Plan:
    """Resolve a recipe against a model.

    Args:
        surgery: what goes and what is changed, once the recipe's score has chosen; until then the plan assumes the last ones.
        curves: what each target loses at each offer, from the survey; without them the budget is shared out evenly, and where
            the method itself decides (`allocation: own`) every target is taken to be as large as it may become.

    Raises:
        BudgetError: no ratio, or one that cannot be met.
        RecipeError: a `keep` pattern matches no target.
    """
    element = torch.empty((), dtype=view.dtype).element_size()
    kept_dense = _kept_dense(view.targets, recipe.keep)
    method, settings = recipe.compression
    shapes = {t.name: shape_of(t, element) for t in view.targets}
    surgery = assumed(view, recipe) if surgery is None else surgery
    gone, zeroed = surgery.dropped, {target.name for target in surgery.zeroed}
    leaving = {target.name for target in view.targets if target.layer in gone or target.name in zeroed}
    items = items_of(method, settings, [t for t in view.targets if t.name not in kept_dense and t.name not in leaving])
    known = offers_of(items, method, settings, recipe.rank_multiple, element)
    nbytes = {name: shape.nbytes for name, shape in shapes.items()}
    dense = {item.name: sum(nbytes[target.name] for target in item.targets) for item in items}
    if curves is None:
        offers = {name: (whole, known[name]) for name, whole in dense.items()}
        if recipe.allocation == "own":
            per_item = {name: ways[-1] if ways else Offer(Choice(), whole) for name, (whole, ways) in offers.items()}
        else:
            per_item = uniform(offers, _of_what_stays(recipe, shapes, leaving))
    else:
        open_targets = {target.name for item in items for target in item.targets}
        kept_bytes = {name: size for name, size in nbytes.items() if name not in open_targets}
        per_item = allocate(recipe, kept_bytes | dense, curves)
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
        sum(view.layer_nbytes(layer) for layer in gone) - sum(shapes[name].nbytes for name in leaving - zeroed)
        + element * (sum(target.out_features for target in surgery.zeroed if target.bias) - surgery.added),
        tuple(view.left_out),
        tuple(items),
        surgery,
        depth_lines(view, recipe, surgery),
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


def _of_what_stays(recipe: Recipe, shapes: Mapping[str, Shape], leaving: Collection[str]) -> float | None:
    """The ratio that is left to remove from the targets that stay, so that all steps together meet the recipe's."""
    if recipe.ratio is None or not leaving:
        return recipe.ratio
    whole = sum(shape.nbytes for shape in shapes.values())
    stay = whole - sum(shapes[name].nbytes for name in leaving)
    return max(0.0, 1 - (1 - recipe.ratio) * whole / stay)


def _kept_dense(targets: list[Target], patterns: tuple[str, ...]) -> dict[str, str]:
    """Target -> the pattern that keeps it; patterns match full names and roles."""
    found: dict[str, str] = {}
    problems = []
    for pattern in patterns:
        hits = [t.name for t in targets if fnmatch.fnmatch(t.name, pattern) or fnmatch.fnmatch(t.role, pattern)]
        if not hits:
            roles = {t.role for t in targets}
            known = roles | {f"*.{role.rpartition('.')[2]}" for role in roles}
            problems.append(f"keep: '{pattern}' matches no target. {did_you_mean(pattern, known)}")
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
