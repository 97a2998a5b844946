"""Whether this machine has the memory and the disk that a plan needs; a run that cannot end is refused before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from ...checkpoint.atomic import require_space
from ...errors import ResourceError
from ..budget import readable
from ..plan import Planned

_CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may take, where it has a limit


def require_room(plan: Planned, out: Path, statistics: Path | None = None, devices: Sequence[torch.device] = ()) -> None:
    """Refuse a plan that this machine has too little memory or disk for.

    Args:
        out: the folder of the result, which need not be there; what an earlier run of the request left in it counts as free.
        statistics: the folder that keeps the statistics; None: they are in `out` while the run lasts.
        devices: of the run.

    Raises:
        ResourceError: the predicted peak is more than the machine's memory and swap, or than what is free on a GPU.
        OutputError: the disk has too little free space.
    """
    if plan.memory.peak > (most := machine_memory()):
        moment = max(plan.memory.moments, key=lambda name: plan.memory.moments[name], default="")
        raise ResourceError(
            f"This run takes about {readable(plan.memory.peak)} of memory (most at the moment '{moment}'), and the machine has "
            f"{readable(most)}, swap included.",
            "Take fewer or shorter calibration samples (--samples, --length), a recipe that needs fewer statistics "
            "(lrc recipe list), or a machine with more memory.",
        )
    for device in devices:
        _require_free(plan, device)
    kept = sum(nbytes for kind, nbytes in plan.scratch.items() if kind.startswith("statistics")) if statistics else 0
    need = plan.disk_peak - kept - _held(out)
    what = "the result needs" if plan.disk_peak == plan.disk_bytes else "the result and the run's own files need"
    require_space(out, need, what, "give an --out on another disk")
    if statistics is not None:
        require_space(statistics, kept - _held(statistics), "the statistics need", "give --statistics a folder on another disk")


def _require_free(plan: Planned, device: torch.device) -> None:
    """Refuse a device with too little free memory."""
    free = free_memory(device)
    if free is not None and plan.memory.gpu_peak > free:
        moment = max(plan.memory.on_gpu, key=lambda name: plan.memory.on_gpu[name])
        raise ResourceError(
            f"This run takes about {readable(plan.memory.gpu_peak)} of the memory of {device} (most at the moment '{moment}'), "
            f"and {readable(free)} are free there.",
            "Take shorter calibration samples (--length), a recipe that needs fewer statistics (lrc recipe list), another "
            "--device, or end what else runs there.",
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free in a GPU's memory; None for a device whose memory torch does not know."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def machine_memory() -> int:
    """Bytes of memory and swap that this process may take at most, as far as the system says."""
    most = psutil.virtual_memory().total + psutil.swap_memory().total
    try:
        limit = _CGROUP.read_text().strip()
    except OSError:  # no control group, or an older kind
        return most
    return min(most, int(limit)) if limit.isdigit() else most


def _held(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
