"""Units across layers: the targets of one role in a few neighbouring layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from pydantic import Field, field_validator

from ..errors import RecipeError, did_you_mean
from .base import Joinable, JointUnit, Settings

# the names that transformers' decoders give to the matrices that read a layer's normalised hidden state
READERS = (
    "*q_proj", "*k_proj", "*v_proj", "*qkv_proj", "*c_attn", "*query_key_value",
    "*gate_proj", "*up_proj", "*gate_up_proj", "*fc1", "*c_fc", "*dense_h_to_4h",
)  # fmt: skip


class NeighbourSettings(Settings):
    """Settings of every method that shares a factor between neighbouring layers."""

    layers: int = Field(2, ge=2, le=64, description="neighbouring layers that share; layers 0 and 1, 2 and 3, … for two")
    roles: tuple[str, ...] = Field(
        READERS, min_length=1, description="patterns of the roles that share; targets of other roles are compressed alone"
    )

    @field_validator("roles", mode="before")
    @classmethod
    def _a_list(cls, roles: object) -> object:
        if isinstance(roles, str):
            raise ValueError(f"write a list of patterns: ['{roles}']")
        return roles


def neighbours(targets: Sequence[Joinable], settings: NeighbourSettings) -> list[JointUnit]:
    """The targets of equal role and equal input width in each run of `settings.layers` layers.

    Experts, and targets with no partner in their run, are left out: they are solved alone.

    Raises:
        RecipeError: a pattern that the user wrote matches no role, or no default pattern matches any.
    """
    roles = list(dict.fromkeys(target.role for target in targets if target.expert is None))
    unmatched = [pattern for pattern in settings.roles if not fnmatch.filter(roles, pattern)]
    by_default = "roles" not in settings.model_fields_set or settings.roles == READERS
    if unmatched and roles and (not by_default or len(unmatched) == len(settings.roles)):
        raise RecipeError(
            "recipe",
            [
                f"settings.roles: '{pattern}' is the role of no open target. {did_you_mean(pattern, roles)}"
                for pattern in unmatched
            ],
            f"The roles of this model are {', '.join(roles)}.",
        )
    units: dict[tuple[str, int, int], list[str]] = {}
    for target in targets:
        if target.expert is None and any(fnmatch.fnmatch(target.role, pattern) for pattern in settings.roles):
            key = target.role, target.layer // settings.layers, target.in_features
            units.setdefault(key, []).append(target.name)
    return [JointUnit(tuple(names), ("",) * len(names)) for names in units.values() if len(names) > 1]
