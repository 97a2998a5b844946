"""A request: a model, a recipe, and the devices for the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibrate.available import require_available
from ..checkpoint.folder import require_usable
from ..checkpoint.location import Location
from ..checkpoint.merging import SHARD_BYTES
from ..checkpoint.opening import devices_of, dtype_of, located
from ..errors import RequestError, together
from ..model.view import ModelView
from ..plan.budget import bytes_of
from ..plan.load_recipe import load_recipe
from ..plan.recipe import Recipe
from ..plan.recipes.amount import require_amount
from .run import CPU


@dataclass(frozen=True)
class Request:
    """A checked request of a user.

    Args:
        location: the location of the model's files.
        recipe: the checked recipe.
        devices: the devices on which layers run.
        dtype: the dtype of the stored tensors; None for the checkpoint's own dtype.
        trust_remote_code: whether code that comes with the checkpoint may run.
        max_shard_bytes: the largest weight file of the result, in bytes; a single tensor may be larger.
    """

    location: Location
    recipe: Recipe
    devices: tuple[torch.device, ...] = (CPU,)
    dtype: torch.dtype | None = None
    trust_remote_code: bool = False
    max_shard_bytes: int = SHARD_BYTES

    @classmethod
    def of(cls, model: str | Path, recipe: str | Path, **settings: Any) -> Request:
        """Make a request from the arguments of `pipeline.compress`.

        Args:
            model, recipe: as for `compress`.
            **settings: `device`, `dtype`, `trust_remote_code`, `max_shard_size`, and keys of the recipe.

        Raises:
            LrcError: an argument is wrong.
        """
        device, dtype = settings.pop("device", "cpu"), settings.pop("dtype", None)
        trusted = settings.pop("trust_remote_code", False)
        most = shard_bytes(settings.pop("max_shard_size", None))
        loaded = load_recipe(str(recipe), flat(settings))
        return cls(located(str(model)), loaded, tuple(devices_of(str(device))), dtype_of(dtype), trusted, most)

    def require_folder(self, out: Path) -> None:
        """Refuse a folder that the result cannot be written into, before any work.

        Raises:
            RequestError: it holds other files, or it is the model's own folder.
            OutputError: it is no folder, or it may not be written to.
        """
        require_usable(out)
        if out.resolve() == self.location.path.resolve():
            raise RequestError(f"--out {out} is the folder of the model itself.", "Give another folder.")

    def view(self) -> ModelView:
        """The model, from its configuration and the headers of its files. It reads weights only when they are needed."""
        return ModelView(self.location, self.dtype, self.trust_remote_code)


def require_possible(recipe: Recipe, location: Location | None = None, hub: bool = True) -> None:
    """Refuse, before a model is read, a recipe without an amount, and calibration text that is not there.

    Args:
        location: of the model, if it is on this machine; one without a tokenizer is refused where text is read.
        hub: refuse calibration text on a hub that is out of reach, too.

    Raises:
        RequestError: one of these mistakes, or all of them together.
    """
    with together() as check:
        check(require_amount, recipe)
        if recipe.reads_text:
            check(require_available, recipe.calibration, hub)
            if location is not None:
                check(location.require_tokenizer)


def shard_bytes(size: str | None) -> int:
    """The bytes of a `max_shard_size` such as '5GB'; None means the default.

    Raises:
        RequestError: the text is no size.
    """
    try:
        return SHARD_BYTES if size is None else bytes_of(size)
    except ValueError as error:
        raise RequestError(f"--max-shard-size '{size}' {error}.") from error


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested keys of a recipe for `load_recipe`: {"calibration": {"samples": 8}} becomes {"calibration.samples": 8}.

    A string as `calibration` means its source. Only `calibration` and `gradients` are flattened; other values are unchanged.
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
