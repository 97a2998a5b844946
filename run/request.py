"""A request: a model, a recipe, and where to run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.artifact import JOURNAL
from ..checkpoint.location import Location, locate
from ..errors import RequestError, did_you_mean
from ..model.view import ModelView
from ..plan.load_recipe import load_recipe
from ..plan.recipe import Recipe
from .run import CPU

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def located(name: str) -> Location:
    """Where a model lies.

    Raises:
        RequestError: the folder holds an interrupted run.
        ModelError: nothing is there.
    """
    require_finished(name)
    return locate(name)


def require_finished(name: str) -> None:
    """Refuse the folder of an interrupted run."""
    if (Path(name) / JOURNAL).is_file() and not (Path(name) / "config.json").is_file():
        raise RequestError(f"{name} holds an interrupted run.", "The `lrc compress` command that began it continues it.")


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name; None of None."""
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise RequestError(f"'{name}' is no dtype of a checkpoint.", did_you_mean(name, DTYPES))
    return DTYPES[name]


def devices_of(text: str) -> list[torch.device]:
    """The devices of a list such as cuda:0,cuda:1, or of auto.

    Raises:
        RequestError: a device is unknown, not there, or named twice.
    """
    count = torch.cuda.device_count()
    if text.strip() == "auto":
        return [torch.device("cuda", index) for index in range(count)] or [CPU]
    devices: list[torch.device] = []
    for part in text.split(","):
        try:
            device = torch.device(part.strip())
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
            raise RequestError(f"'{part}' is no device for lrc.", "Write cpu, cuda, cuda:1, cuda:0,cuda:1 or auto.")
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            if device.index >= count:
                raise RequestError(f"There is no device {part}: torch sees {count} GPUs here.", "Write cpu or auto.")
        if device in devices or (device.type == "cpu" and len(text.split(",")) > 1):
            raise RequestError(f"--device {text} spreads work over one device twice, or over the CPU and others.",
                               "Name GPUs, each once.")  # fmt: skip
        devices.append(device)
    return devices
