"""Keys of a recipe that do not go together: one table, read from top to bottom; the first that holds is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..compress.base import BACKWARD_NEEDS
from . import budget

if TYPE_CHECKING:
    from .recipe import Recipe


@dataclass(frozen=True)
class Clash:
    """Keys that do not go together.

    Args:
        when: whether a recipe has them.
        why: what is told: the reason, and what to write in their place.
    """

    when: Callable[[Recipe], bool]
    why: Callable[[Recipe], str]


def _methods(recipe: Recipe) -> list[str]:
    return [key for key in ("method", "steps", "alternatives") if getattr(recipe, key)]


def _budgets(recipe: Recipe) -> list[str]:
    return [key for key in budget.KEYS if getattr(recipe, key) is not None]


def _unjudged(recipe: Recipe) -> list[str]:
    judged = ("refine", "correction", "max_ppl_increase")
    return [] if recipe.calibration.held_out else [key for key in judged if getattr(recipe, key) is not None]


def _counts_layers(recipe: Recipe) -> bool:
    return recipe.depth is not None and (recipe.depth.drop is not None or recipe.depth.ratio is not None)


def _across_layers(recipe: Recipe) -> bool:
    joint = recipe.compression[0].joint
    return joint is not None and joint.across_layers


def _rule_refuses(recipe: Recipe) -> str:
    return "" if recipe.rule is None else recipe.rule.why_not(recipe.compression[0])


CLASHES = (
    # which methods
    Clash(lambda r: len(_methods(r)) > 1, lambda r: f"give either {' or '.join(map(repr, _methods(r)))}, not both"),
    Clash(lambda r: not _methods(r) and r.depth is None, lambda r: "'method' is missing"),
    Clash(
        lambda r: bool(r.settings) and r.method is None,
        lambda r: (
            "settings are those of one method, and there is none here; write "
            + (f"{_methods(r)[0]}.0.settings" if _methods(r) else "depth")
        ),
    ),
    Clash(
        lambda r: bool(r.alternatives) and r.allocation in ("uniform", "own"),
        lambda r: f"allocation: {r.allocation} cannot choose between alternatives; take kl or spectrum",
    ),
    # depth
    Clash(
        lambda r: r.depth is not None and bool(_methods(r)) and not _counts_layers(r),
        lambda r: "depth: say how many layers to drop (drop or ratio); the recipe's ratio is that of all steps",
    ),
    Clash(
        lambda r: _counts_layers(r) and bool(r.ratio) and r.method is None and not r.steps,
        lambda r: "depth says how much to drop; leave out either that (depth.drop, depth.ratio) or the recipe's ratio",
    ),
    Clash(
        lambda r: r.depth is not None and (r.allocation != "uniform" or bool(r.compression[0].needs & BACKWARD_NEEDS)),
        lambda r: "depth goes with allocation: uniform and methods without a backward pass",
    ),
    # held-out text
    Clash(
        lambda r: bool(_unjudged(r)),
        lambda r: f"{_unjudged(r)[0]} is judged by held-out windows: say how many (calibration.held_out: 4)",
    ),
    Clash(
        lambda r: r.correction is not None and r.propagate != "compressed",
        lambda r: "correction follows the compressed model's inputs: it goes with propagate: compressed",
    ),
    # how much
    Clash(
        lambda r: len(_budgets(r)) > 1,
        lambda r: f"{' and '.join(_budgets(r))} say the budget {len(_budgets(r))} times; give one of them",
    ),
    Clash(
        lambda r: r.allocation == "own" and _budgets(r) not in ([], ["ratio"]),
        lambda r: f"allocation: own lets the method's settings decide every size; leave out {_budgets(r)[0]}",
    ),
    Clash(
        lambda r: r.allocation == "own" and bool(r.limits),
        lambda r: "allocation: own lets the method's settings decide every size; leave out limits",
    ),
    Clash(
        lambda r: r.max_ppl_increase is not None and not _methods(r),
        lambda r: "max_ppl_increase: the search goes by ratios, and whole layers have none; say depth.drop or ratio",
    ),
    # where the budget goes
    Clash(
        lambda r: r.allocation == "fisher" and "grad_gram" not in r.compression[0].needs,
        lambda r: f"allocation: fisher takes losses that are in nats, and {r.compression[0].name}'s are not; use kl or kfac",
    ),
    Clash(lambda r: bool(_rule_refuses(r)), _rule_refuses),
    Clash(
        lambda r: r.rule is not None and bool(r.limits) and not r.rule.limits,
        lambda r: f"allocation: {r.allocation} cannot be held to limits; keep: leaves targets dense",
    ),
    Clash(
        lambda r: r.rule is not None and "weight_grad" in r.rule.needs and r.gradients.labels != "data",
        lambda r: (
            f"allocation: {r.allocation} reads the mean gradient, which is zero for labels drawn from the model; "
            "set gradients.labels to data"
        ),
    ),
    # methods that solve targets of several layers at once
    Clash(
        lambda r: _across_layers(r) and r.propagate == "compressed",
        lambda r: f"{r.method} solves targets of several layers at once and needs 'propagate: original'",
    ),
    Clash(
        lambda r: _across_layers(r) and r.refine is not None and r.refine.block is not None,
        lambda r: f"{r.method} shares between layers, which refine: block would train apart; use refine: end-to-end",
    ),
    Clash(
        lambda r: _across_layers(r) and r.depth is not None,
        lambda r: f"{r.method} solves targets of several layers at once; drop layers in a run of its own before",
    ),
)
