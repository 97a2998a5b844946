"""What a run left, as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.artifact import read_record
from ..plan.plan import Plan
from .layer_loop import TargetRecord


@dataclass(frozen=True)
class Result:
    """A finished artifact.

    Args:
        folder: where it lies.
        record: `lrc.json`: recipe, versions, calibration, sizes, every target.
        plan: what was carried out; None where the folder held the finished result already.
    """

    folder: Path
    record: dict[str, Any] = field(repr=False)
    plan: Plan | None = field(default=None, repr=False)

    @classmethod
    def read(cls, folder: Path, plan: Plan | None = None) -> Result:
        """The result in a folder.

        Raises:
            CheckpointError: there is none, or its record is damaged.
        """
        return cls(folder, read_record(folder), plan)

    @property
    def made(self) -> bool:
        """Whether this call made it; False where it was there already."""
        return self.plan is not None

    @property
    def shards(self) -> list[Path]:
        """The safetensors files."""
        return [self.folder / name for name in self.record["shards"]]

    @property
    def bytes_before(self) -> int:
        """Of the whole model's tensors."""
        return int(self.record["bytes"]["model_before"])

    @property
    def bytes_after(self) -> int:
        """Of the whole model's tensors."""
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
        """What became of each target."""
        return [TargetRecord(**each) for each in self.record["targets"]]

    @property
    def metrics(self) -> dict[str, Any]:
        """What was measured on held-out calibration text on the way: by a search, by repairs, by a refinement."""
        found = {"searched": self.record.get("searched"), "refinement": self.record.get("refinement")}
        repair = self.record.get("depth", {}).get("repair")
        return {name: value for name, value in (found | {"repair": repair}).items() if value}
