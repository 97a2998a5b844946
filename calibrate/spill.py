"""Hidden states on disk between a forward and a backward pass, and the gradients with which a killed pass resumes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoint.atomic import checked_tensors, write_tensors
from ..errors import OutputError

_GRADIENT = "gradient.safetensors"


class Spill:
    """A folder of hidden states, one file per layer, a tensor per batch.

    Args:
        folder: of the files; those of other passes are deleted.
        identity: names the pass; only a pass of the same identity resumes from these files.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._root = folder
        try:
            for other in folder.iterdir() if folder.is_dir() else ():
                if other != self.folder:
                    shutil.rmtree(other)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def require_space(self, nbytes: int) -> None:
        """Refuse to start where the disk is too small for `nbytes` of hidden states.

        Raises:
            OutputError: says how much is free and how much is needed.
        """
        held = sum(path.stat().st_size for path in self.folder.glob("hidden-*"))
        free = shutil.disk_usage(self.folder).free + held
        if free < nbytes:
            raise OutputError(
                f"{self._root} has {free / 1e9:,.1f} GB free; a backward pass puts down {nbytes / 1e9:,.1f} GB of activations.",
                "Free some space, give a folder on another disk, or calibrate on fewer samples.",
            )

    def put(self, layer: int, hidden: Sequence[Tensor]) -> None:
        """Write the inputs of a layer, one tensor per batch, in their dtype."""
        self._save({str(batch): tensor for batch, tensor in enumerate(hidden)}, self._path(layer), {})

    def get(self, layer: int, batch: int, device: torch.device) -> Tensor:
        """One batch's input of a layer."""
        with checked_tensors(self._path(layer), "Was it changed or deleted meanwhile? Start the command again.") as file:
            return file.get(str(batch)).to(device)

    def finish(self, layer: int, gradients: Sequence[Tensor]) -> None:
        """Finish a layer: store the gradients with respect to its input, (samples, length, hidden) per batch."""
        self._save({"gradient": torch.cat(list(gradients))}, self.folder / _GRADIENT, {"layer": str(layer)})
        self._path(layer).unlink(missing_ok=True)

    def resume(self) -> tuple[int, Tensor] | None:
        """The last finished layer and the gradients with respect to its input, (samples, length, hidden); None if none is."""
        path = self.folder / _GRADIENT
        if not path.is_file():
            return None
        with checked_tensors(path, f"Delete {self._root}; the pass starts over.") as file:
            return int(file.metadata["layer"]), file.get("gradient")

    def remove(self) -> None:
        """Delete the files: the pass is done."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05d}.safetensors"

    def _save(self, tensors: dict[str, Tensor], path: Path, record: dict[str, str]) -> None:
        try:
            write_tensors(path, tensors, record)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> OutputError:
        return OutputError(f"Cannot write into {self._root}: {error}", "Free some space, or give a folder on another disk.")
