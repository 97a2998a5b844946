"""What is recorded of a repair, in `lrc.json` under `depth.repair`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunRecord:
    """The repair of one run of neighbouring layers.

    Args:
        layers: the run, ascending.
        accepted: whether the repair is in the result.
        where: what holds it, in words.
        tokens: how many tokens it was fitted to or trained on.
    """

    layers: list[int]
    accepted: bool
    where: str
    tokens: int


@dataclass(frozen=True)
class RepairRecord:
    """A repair, judged on held-out text. Keys of kinds of repair that it does not belong to are None, and not written.

    Args:
        repair: its name in recipes.
        held_out_tokens: how many tokens judged it.
        loss_without, loss: held-out loss of the pruned model and of the result, nats per predicted token.
        runs: one entry per run of dropped layers.
        layers: those that were trained, where no run was repaired.
        accepted: whether the trained values are in the result, where no run was repaired.
        head: whether the output head was trained, in words.
        training: what the training did.
    """

    repair: str
    held_out_tokens: int
    loss_without: float
    loss: float
    runs: list[RunRecord] | None = None
    layers: list[int] | None = None
    accepted: bool | None = None
    head: str | None = None
    training: Mapping[str, Any] | None = None

    def added_to(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A model edit's record with this one under 'repair'."""
        return {**record, "repair": {key: value for key, value in asdict(self).items() if value is not None}}
