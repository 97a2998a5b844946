"""Whether a recipe says how much should go, before a model is read."""

from __future__ import annotations

from ...errors import BudgetError
from ...model.targets import Target
from ..budget import ASK
from ..recipe import Recipe
from ..units import options_of, units_of

_LAYERS = 3
_WIDTH, _INNER = 256, 512
# the matrices of a decoder layer as most architectures call them: (role, first of its group, out, in)
_ROLES = (
    ("self_attn.q_proj", "self_attn.q_proj", _WIDTH, _WIDTH),
    ("self_attn.k_proj", "self_attn.q_proj", _WIDTH, _WIDTH),
    ("self_attn.v_proj", "self_attn.q_proj", _WIDTH, _WIDTH),
    ("self_attn.o_proj", "self_attn.o_proj", _WIDTH, _WIDTH),
    ("mlp.gate_proj", "mlp.gate_proj", _INNER, _WIDTH),
    ("mlp.up_proj", "mlp.gate_proj", _INNER, _WIDTH),
    ("mlp.down_proj", "mlp.down_proj", _WIDTH, _INNER),
)


def require_amount(recipe: Recipe) -> None:
    """Refuse a recipe that names no amount although its method has more than one size to choose from.

    The planner decides it for the model itself; here a layer of the usual matrices stands for it. Whatever depends on the
    model (limits, patterns of roles) is left to the planner.

    Raises:
        BudgetError: it names none.
    """
    given = [*recipe.amounts.values(), recipe.max_ppl_increase]
    left = recipe.allocation == "own" or (recipe.dropping is not None and recipe.compresses_nothing)
    if left or any(each is not None for each in given):
        return
    if recipe.limits:
        if recipe.allocation != "uniform":
            raise BudgetError("How much should go? The recipe names no ratio, and its limits determine none.", ASK)
        return
    method, settings = recipe.compression
    units = units_of(method, settings, _usual_targets())
    if any(len(options) > 1 for options in options_of(units, method, settings, recipe.rank_multiple, 2).values()):
        raise BudgetError("How much should go? The recipe names no ratio.", ASK)


def _usual_targets() -> list[Target]:
    return [
        Target(f"{place}.{role}", f"{place}.{role}", layer, role, f"{place}.{first}", out, into, False)
        for layer in range(_LAYERS)
        for place in [f"model.layers.{layer}"]
        for role, first, out, into in _ROLES
    ]
