"""What this machine offers to lrc, and what to do where something is missing: versions, devices, memory, disk, the hub."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import huggingface_hub
import psutil
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from .cpu_16bit import slow_dtypes

_NEEDED = ("lrc", "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "datasets", "lm_eval")
_FOR_FORMATS = {"gguf": "reads .gguf files", "compressed-tensors": "loads exports to compressed-tensors", "peft": "adapters"}
_LITTLE_MEMORY, _LITTLE_DISK = 4 << 30, 5 << 30
_PATIENCE = 2.0  # seconds
# what all transport errors of the hub's client derive from, which changes (httpx, httpx2)
_TransportError: type[Exception] = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        topic: what it is.
        found: what was found, in words.
        remedy: what to do about it; empty where all is well.
    """

    topic: str
    found: str
    remedy: str = ""


def examined(folder: Path) -> list[Finding]:
    """Everything that is looked at; takes seconds at most, and loads no model.

    Args:
        folder: where results would be written.
    """
    checks: tuple[Callable[[], list[Finding]], ...] = (_versions, _devices, _memory, lambda: _disks(folder), _hub)
    return [finding for check in checks for finding in check()]


def _versions() -> list[Finding]:
    found = [Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name in _NEEDED:
        has = _version(name)
        found.append(Finding(name, has or "not installed", "" if has else f"pip install {name}"))
    for name, use in _FOR_FORMATS.items():
        has = _version(name)
        found.append(Finding(name, has or f"not installed ({use})", "" if has else f"pip install {name}, if you need it"))
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _devices() -> list[Finding]:
    cores, threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1, torch.get_num_threads()
    cpu = Finding("cpu", f"{cores} cores, {threads} threads in use, {torch.backends.cpu.get_cpu_capability()}")
    slow = sorted(str(dtype).removeprefix("torch.") for dtype in slow_dtypes())
    kinds = Finding(
        "16-bit products", f"without instructions for {', '.join(slow)}: computed in float32" if slow else "by the cpu"
    )
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        remedy = "Look at nvidia-smi and the driver's version." if torch.version.cuda else ""
        return [cpu, kinds, Finding("gpu", f"none ({built})", remedy)]
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        gpus.append(Finding(f"gpu cuda:{index}", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"))
    return [cpu, kinds, *gpus]


def _memory() -> list[Finding]:
    held = psutil.virtual_memory()
    said = f"{held.available / 1e9:.1f} of {held.total / 1e9:.1f} GB available"
    short = "Close other programs; lrc plan says what a run takes." if held.available < _LITTLE_MEMORY else ""
    return [Finding("memory", said, short)]


def _disks(folder: Path) -> list[Finding]:
    places = {
        "results": folder,
        "temporary files (TMPDIR)": Path(tempfile.gettempdir()),
        "hub's cache (HF_HOME)": Path(constants.HF_HOME),
    }
    found = []
    for what, place in places.items():
        standing = next(path for path in [place.absolute(), *place.absolute().parents] if path.exists())
        free, writable = shutil.disk_usage(standing).free, os.access(standing, os.W_OK)
        remedy = "Free some space, or name another place." if free < _LITTLE_DISK else ""
        remedy = remedy if writable else f"Nothing can be written to {standing}: name another place."
        found.append(Finding(what, f"{place}: {free / 1e9:.1f} GB free{'' if writable else ', read-only'}", remedy))
    return found


def _hub() -> list[Finding]:
    if constants.HF_HUB_OFFLINE:
        return [Finding("hub", "offline mode is set (HF_HUB_OFFLINE)", "Unset it to download models and texts.")]
    try:
        huggingface_hub.HfApi().dataset_info("Salesforce/wikitext", timeout=_PATIENCE)
    except (OSError, _TransportError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        return [Finding("hub", f"not reachable ({reason})", "Take local models, and text:PATH or pydoc as calibration text.")]
    return [Finding("hub", f"reachable ({constants.ENDPOINT})")]
