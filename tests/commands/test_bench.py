"""`lrc bench`: figures of a model and its baseline, in a table and as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from commandline import run_lrc
from pipeline import compress

from lrc.evaluation.speed import Speed


def test_a_result_is_measured_beside_its_original(tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=96)
    compress(model, tmp_path / "out", tiny_text_file, "rtn", settings__group_size=16)  # a group that no kernel knows
    options = ["--baseline", model, "--prefill", "16,100000", "--decode", "1,2", "--rounds", 2, "--json", tmp_path / "x.json"]
    done = run_lrc("bench", tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert "times as fast" in done.out and "prefill 16 " in done.out and "decode 2 " in done.out
    assert "decoded at every call: torch has no kernel for groups of 16" in done.out
    held = json.loads((tmp_path / "x.json").read_text())
    own, base = held["models"]
    assert set(held["times_as_fast"]) == {"first token", "prefill 16", "decode 1", "decode 2"}  # 100,000 tokens do not fit
    assert own["tensor_bytes"] < base["tensor_bytes"] and held["dtype"] == "bfloat16" and held["bandwidth"] > 0
    assert all(len(seconds) == 2 for seconds in own["seconds"].values())


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    fast = Speed("a", seconds={"decode 2": [1.0, 2.0, 9.0]})
    slow = Speed("b", seconds={"decode 2": [2.0, 8.0, 18.0]})
    assert fast.times_as_fast_as(slow, "decode 2") == 2.0
    assert fast.rate("decode 2") == 1.0 and fast.median("decode 2") == 2.0


@pytest.mark.parametrize(("option", "value"), [("--prefill", "many"), ("--decode", "0"), ("--decode", "")])
def test_a_list_that_is_none_is_refused(option, value, tmp_path):
    done = run_lrc("bench", tmp_path, option, value)
    assert done.code == 2 and option in done.err
