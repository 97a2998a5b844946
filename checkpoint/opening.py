"""How a person says which model to open, in which dtype and on which devices; checked."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import RequestError, did_you_mean
from .folder import JOURNAL
from .location import Location, locate
from .untrusted.files import require_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    require_path(name)
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
        return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
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
