"""What a plan says before a run: what makes this run slow on this machine."""

from __future__ import annotations

import pytest
import yaml
from commandline import lrc_ok

from lrc.compress.quantize.encoding import compiled

MIXED = {"alternatives": [{"method": "trellis", "settings": {"bits": None}}, {"method": "svd-llm"}], "allocation": "kl"}
STEPS = {"steps": [{"method": "svd-llm"}, {"method": "trellis"}]}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("trellis", True), ("yaqa", True), ("caldera", False), ("gptq", False), (MIXED, True), (STEPS, True),
        ({"method": "caldera", "settings": {"code": "trellis", "rank": 4}}, True),
        ({"method": "trellis", "settings": {"code": "e8", "bits": 2}}, False),
    ],
)  # fmt: skip
def test_a_trellis_without_numba_is_said_to_be_slow(recipe, said, tiny_checkpoints, tiny_text_file, tmp_path, monkeypatch):
    if isinstance(recipe, dict):
        file = tmp_path / "own.yaml"
        budget = {} if recipe.get("method") else {"ratio": 0.5}
        file.write_text("# A recipe of a test.\n" + yaml.safe_dump(recipe | budget))
        recipe = str(file)
    command = ["plan", tiny_checkpoints("llama"), "--recipe", recipe, "--calibration", f"text:{tiny_text_file}"]
    assert "numba is not installed" not in lrc_ok(*command)
    monkeypatch.setattr(compiled, "has_numba", lambda: False)
    assert ("numba is not installed" in lrc_ok(*command)) is said
