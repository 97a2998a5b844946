"""Statistics in chunks under a memory budget: the same bytes, whatever the budget."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from commandline import contents
from pipeline import compress

import lrc.calibrate.stats
from lrc.calibrate.stats import LayerCollector
from lrc.model.targets import Target

RUNS = {
    "one-shot": {},
    "sequential": {"propagate": "compressed"},
    "from disk": {"allocation": "spectrum"},
    "gradients": {"recipe": "kfac"},
    "units": {"recipe": "shared-input"},
    "units across layers": {"recipe": "basis-sharing"},
    "both models": {"refine": {"block": {"epochs": 1}}, "calibration.held_out": 2},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_a_budget_of_one_group_gives_the_same_bytes(family, run, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    model, wanted = tiny_checkpoints(family), {"ratio": 0.3, **RUNS[run]}
    compress(model, tmp_path / "whole", tiny_text_file, **wanted)
    groups: list[int] = []
    made = LayerCollector.__init__

    def counted(self: LayerCollector, layer: object, prefix: str, targets: Sequence[Target], *rest: object) -> None:
        groups.append(len({target.group for target in targets}))
        made(self, layer, prefix, targets, *rest)

    monkeypatch.setattr(lrc.calibrate.stats, "STATISTICS_AT_ONCE", 1)
    monkeypatch.setattr(LayerCollector, "__init__", counted)
    compress(model, tmp_path / "chunks", tiny_text_file, **wanted)
    if not run.startswith("units"):  # a unit's members stay together
        assert max(groups, default=0) <= 1
    assert contents(tmp_path / "chunks") == contents(tmp_path / "whole")
