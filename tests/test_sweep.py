"""`lrc sweep`: rows that are what a person would type, one table, and a command that goes on."""

from __future__ import annotations

import json
import sys

import pytest
from commandline import lrc_ok, run_lrc

from lrc.errors import SweepError
from lrc.sweep import Job, _run, run_sweep


def test_a_table_of_recipes_and_ratios_and_the_same_command_goes_on(tiny_checkpoints, tiny_text_file, tmp_path):
    model, out, other = tiny_checkpoints("llama", max_position_embeddings=2048), tmp_path / "out", tmp_path / "other.txt"
    other.write_text(tiny_text_file.read_text()[::-1] * 4)
    command = (
        "sweep", model, "--out", out, "--recipes", "svd-llm", "--ratios", "0.2,0.5", "--tasks", f"text:{other}",
        "--parallel", 2, "--max-windows", 1,
        "--calibration", f"text:{tiny_text_file}*0.5+pydoc*0.5", "--samples", 4, "--length", 32,
    )  # fmt: skip
    said = lrc_ok(*command)
    rows = {row["name"]: row for row in json.loads((out / "sweep.json").read_text())["rows"]}
    assert set(rows) == {"original", "svd-llm-0.2", "svd-llm-0.5"}
    assert rows["svd-llm-0.5"]["nbytes"] < rows["svd-llm-0.2"]["nbytes"]
    assert 0.2 <= rows["svd-llm-0.2"]["removed"] < 0.5 <= rows["svd-llm-0.5"]["removed"]
    assert all(row["metrics"] for row in rows.values()) and rows["svd-llm-0.2"]["peak_bytes"] > 10**8
    assert all(name in said and name in (out / "sweep.md").read_text() for name in rows)
    assert not list(out.glob("svd*/*")), "checkpoints go unless --keep"
    # the same command with a row missing makes that row alone, and it comes out the same
    held = json.loads((out / "sweep.json").read_text())
    held["rows"] = [row for row in held["rows"] if row["name"] != "svd-llm-0.5"]
    (out / "sweep.json").write_text(json.dumps(held))
    made = [line for line in lrc_ok(*command).splitlines() if line.endswith(" s")]
    assert [line.split(":")[0] for line in made] == ["svd-llm-0.5"]
    again = {row["name"]: row for row in json.loads((out / "sweep.json").read_text())["rows"]}
    assert again["svd-llm-0.5"]["metrics"] == rows["svd-llm-0.5"]["metrics"]
    refused = run_lrc(*command, "--seed", 7)
    assert refused.code == 2 and "another sweep" in refused.err


def test_a_row_that_fails_is_named_with_its_last_words_and_the_others_stay(tmp_path):
    """The model is no model: both rows fail in processes of their own."""
    with pytest.raises(SweepError) as failed:
        run_sweep("nobody/nothing", [Job(None), Job("svd", 0.2)], tmp_path, compress=[], evaluate=["--tasks", "c4"])
    assert "original" in str(failed.value) and "- svd-0.2: " in str(failed.value)
    assert "nobody/nothing" in str(failed.value) and "Traceback" not in str(failed.value)


def test_a_rows_memory_is_its_own(tmp_path):
    """Linux hands on to a child, as its peak, what its parent held when it was started."""
    ballast = bytearray(700 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    seconds, peak = _run([sys.executable, "-c", "import time; x = bytearray(90 << 20); time.sleep(1)"], tmp_path / "log", 1)
    assert seconds > 1 and 90 << 20 < peak < 250 << 20
