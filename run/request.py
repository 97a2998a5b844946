"""A request: a model, a recipe, and where to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.location import Location
from ..checkpoint.opening import devices_of, dtype_of, located
from ..model.view import ModelView
from ..plan.load_recipe import load_recipe
from ..plan.recipe import Recipe
from .run import CPU


@dataclass(frozen=True)
class Request:
    """What a person asks for.

    Args:
        location: where the model lies.
        recipe: checked.
        devices: where layers run.
        dtype: of the stored tensors; None: the checkpoint's own.
        trust_remote_code: whether code that comes with the checkpoint may run.
    """

    location: Location
    recipe: Recipe
    devices: tuple[torch.device, ...] = (CPU,)
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, model: str | Path, recipe: str | Path, **settings: Any) -> Request:
        """From what a person writes: `device`, `dtype`, `trust_remote_code`, and keys of the recipe.

        Raises:
            LrcError: what is wrong with any of them.
        """
        device, dtype = settings.pop("device", "cpu"), settings.pop("dtype", None)
        trusted = settings.pop("trust_remote_code", False)
        loaded = load_recipe(str(recipe), flat(settings))
        return cls(located(str(model)), loaded, tuple(devices_of(str(device))), dtype_of(dtype), trusted)

    def view(self) -> ModelView:
        """The model, from its configuration and headers; weights are read when they are asked for."""
        return ModelView(self.location, self.dtype, self.trust_remote_code)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a recipe as `load_recipe` takes them: {"calibration": {"samples": 8}} becomes {"calibration.samples": 8}.

    The calibration's source may be given alone. Keys with names of the user's own below them (`limits`, `steps`) stay whole.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "calibration" and isinstance(value, str):
            found["calibration.source"] = value
        elif key in ("calibration", "gradients") and isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            found[key] = value
    return found
