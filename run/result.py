"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..checkpoint.folder import read_record
from ..checkpoint.untrusted.record import problem
from ..errors import CheckpointError
from ..plan.plan import Plan
from .layer_loop import TargetRecord


@dataclass(frozen=True)
class Result:
    """A finished artifact.

    Args:
        folder: the artifact's folder.
        record: the content of `lrc.json`: recipe, versions, calibration set, sizes, every target.
        plan: the plan that was carried out; None if the folder contained the finished result already.
    """

    folder: Path
    record: dict[str, Any] = field(repr=False)
    plan: Plan | None = field(default=None, repr=False)

    @classmethod
    def read(cls, folder: Path, plan: Plan | None = None) -> Result:
        """Read the result from a folder.

        Raises:
            CheckpointError: the folder contains no finished result, or its record is damaged.
        """
        return cls(folder, read_record(folder), plan)

    @property
    def made(self) -> bool:
        """Whether this call made the result; False if the folder contained it already."""
        return self.plan is not None

    @property
    def shards(self) -> list[Path]:
        """The safetensors files."""
        return [self.folder / name for name in self.record["shards"]]

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors of the original model."""
        return int(self.record["bytes"]["model_before"])

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors of the compressed model."""
        return int(self.record["bytes"]["model_after"])

    @property
    def ratio(self) -> float:
        """The fraction of the targets' bytes that was removed."""
        return float(self.record["ratio"])

    @property
    def whole_ratio(self) -> float:
        """The fraction of the whole model's bytes that was removed."""
        return float(self.record["ratio_of_whole_model"])

    @cached_property
    def targets(self) -> list[TargetRecord]:
        """The record of each target."""
        try:
            return TypeAdapter(list[TargetRecord]).validate_python(self.record["targets"])
        except ValidationError as error:
            raise CheckpointError(
                f"{self.folder}: the record of a target is damaged: {problem(error)}.", "Write it again."
            ) from error

    @property
    def metrics(self) -> dict[str, Any]:
        """Measurements on the held-out part of the calibration set: by a search for the size, a repair, or a refinement."""
        found = {"searched": self.record.get("searched"), "refinement": self.record.get("refinement")}
        repair = self.record.get("depth", {}).get("repair")
        return {name: value for name, value in (found | {"repair": repair}).items() if value}
