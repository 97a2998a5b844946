"""The recipe key `depth`: which score chooses layers or sub-layers to remove, how many, and which repair follows."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import BudgetError, did_you_mean
from .base import Training, repairs, scores


class DepthSpec(BaseModel):
    """Layers or sub-layers are removed before anything else is done.

    Args:
        score: chooses them (`lrc recipe scores`).
        granularity: 'layer', or 'sub-layer': attention and feed-forward are removed independently.
        drop: how many are removed; or
        ratio: the fraction of layers to remove, rounded up; of sub-layers, the least fraction of the targets' bytes to remove.
        protect_first, protect_last: how many layers at either end are not removed.
        repair: compensates for removed layers (`lrc recipe scores` lists repairs too).
        damping: ridge of a repair's least squares, relative to the mean diagonal of the gram; pulls the map towards identity.
        hold_out: fraction of the calibration samples that a repair is not fitted to, and on which it must not raise the loss;
            unused where the calibration has held-out windows of its own (`calibration.held_out`).
        loss_samples, loss_length: number of calibration samples, and tokens of each, on which a score measures losses.
        training: settings of a trained repair.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    score: str
    granularity: Literal["layer", "sub-layer"] = "layer"
    drop: int | None = Field(None, ge=1)
    ratio: float | None = Field(None, gt=0, lt=1)
    protect_first: int = Field(1, ge=0)
    protect_last: int = Field(1, ge=0)
    repair: str = "none"
    damping: float = Field(0.0, ge=0)
    hold_out: float = Field(0.125, gt=0, lt=1)
    loss_samples: int = Field(8, ge=1)
    loss_length: int = Field(128, ge=2)
    training: Training = Training()

    @field_validator("score")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in scores():
            raise ValueError(f"there is no layer score '{name}'. {did_you_mean(name, scores())}")
        return name

    @field_validator("repair")
    @classmethod
    def _known_repair(cls, name: str) -> str:
        if name != "none" and name not in repairs():
            raise ValueError(f"there is no repair '{name}'. {did_you_mean(name, ['none', *repairs()])}")
        return name

    @model_validator(mode="after")
    def _one_count(self) -> DepthSpec:
        if self.drop is not None and self.ratio is not None:
            raise ValueError("give either 'drop' or 'ratio', not both")
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> DepthSpec:
        score, repair = scores()[self.score], repairs().get(self.repair)
        if self.granularity == "sub-layer" and not score.tries:
            able = ", ".join(name for name, each in scores().items() if each.tries)
            raise ValueError(f"score {self.score} knows whole layers only; granularity sub-layer goes with {able}")
        if self.granularity == "sub-layer" and repair is not None and repair.on != "end":
            raise ValueError(f"repair {self.repair} stands in for whole layers; granularity sub-layer allows none")
        if repair is not None and repair.on == "layer" and not score.one_run:
            able = ", ".join(name for name, each in scores().items() if each.one_run)
            raise ValueError(f"repair {self.repair} stands in for one run of neighbours; take score {able}")
        if self.damping and not (repair is not None and repair.damped):
            able = ", ".join(name for name, each in repairs().items() if each.damped)
            raise ValueError(f"repair {self.repair} has no use for damping; those by least squares do: {able}")
        if self.training != Training() and (repair is None or not repair.trained):
            raise ValueError(f"training is of a trained repair, and repair is {self.repair}")
        return self


def how_many(spec: DepthSpec, layers: int) -> int:
    """The number of dropped layers; a ratio is rounded up, so that no fewer than asked for are dropped.

    Raises:
        BudgetError: fewer layers than that are not protected.
    """
    count = spec.drop if spec.drop is not None else -int(-(spec.ratio or 0) * layers // 1)
    open_layers = layers - spec.protect_first - spec.protect_last
    keeps_one = spec.repair in repairs() and repairs()[spec.repair].on == "layer"  # a layer of the run, in place of the run
    spare = 1 if keeps_one else 0
    if not 0 < count <= open_layers - spare:
        stands = f", one of which is to stand in for the {count + 1} of a run" if spare else ""
        raise BudgetError(
            f"depth: {count} of {layers} layers shall go, and {max(open_layers, 0)} are not protected{stands}.",
            "Change how many go (depth.drop, depth.ratio, or the ratio), depth.protect_first or depth.protect_last.",
        )
    return count
