"""`lrc bench`: figures of a model and its baseline, in a table and as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from commandline import run_lrc
from pipeline import compress
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from lrc.compress.forms.base import build_module
from lrc.compress.forms.codes import reading
from lrc.compress.forms.codes.code import Code
from lrc.compress.forms.cpu.int4 import available
from lrc.compress.forms.grids import Grid
from lrc.evaluation.speed import Speed, SpeedReport, described


def test_a_result_is_measured_beside_its_original(tiny_checkpoints, tiny_text_file, tmp_path):
    model = tiny_checkpoints("llama", dtype=torch.bfloat16, hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
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
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert own["file_bytes"] == files and "files of weights" in done.out
    table = 64 * AutoConfig.from_pretrained(model).vocab_size * 2
    assert own["tensor_bytes"] - own["read_bytes"] == table, "one row of the input embedding is read for a token"
    assert all(len(seconds) == 2 for seconds in own["seconds"].values())


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    fast = Speed("a", seconds={"decode 2": [1.0, 2.0, 9.0]})
    slow = Speed("b", seconds={"decode 2": [2.0, 8.0, 18.0]})
    assert fast.times_as_fast_as(slow, "decode 2") == 2.0
    assert fast.rate("decode 2") == 1.0 and fast.median("decode 2") == 2.0


@pytest.mark.skipif(not available(), reason="torch has no 4-bit kernel for this processor, or another layout")
@pytest.mark.parametrize(("bits", "held"), [(3, "take 4"), (4, None), (6, "take 8"), (8, None)])
def test_it_says_where_memory_holds_more_bits_than_the_file(bits, held):
    spec = {"kind": "quantized", "grid": Grid(bits, 32).spec(), "bias": False}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=0, vocab_size=9, intermediate_size=64))
    model.add_module("coded", build_module(spec, 64, 64, torch.bfloat16))
    notes = described("a", model).notes
    assert held is None or f"1 matrices of {bits} bits {held}" in notes[0]
    assert bool(notes) == (held is not None)


@pytest.mark.parametrize(("kind", "state_bits"), [("trellis", 12), ("e8", 0)])
@pytest.mark.parametrize("numba", [True, False])
def test_it_says_where_codes_are_decoded_by_torch(kind, state_bits, numba, monkeypatch):
    monkeypatch.setattr(reading, "has_numba", lambda: numba)
    spec = {"kind": "encoded", "code": Code(kind, 2, state_bits).spec(), "seed": 1, "bias": False}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=0, vocab_size=9, intermediate_size=64))
    model.add_module("coded", build_module(spec, 64, 64, torch.bfloat16))
    found = described("a", model)
    assert found.forms["rotated"] == 1
    expected = "this is e8" if kind == "e8" else None if numba else "numba is not installed"
    assert bool(found.notes) == (expected is not None)
    assert expected is None or f"1 of 1 matrices in a trellis or lattice are decoded by torch's operations: {expected}" in (
        found.notes[0].replace("only a trellis is decoded by compiled code, and ", "")
    )


def test_where_it_is_slower_it_says_why():
    slow = Speed("a", seconds={"prefill 512": [2.0], "decode 8": [2.0], "decode 1": [1.0]}, forms={"packed": 7})
    report = SpeedReport((slow, Speed("b", seconds={workload: [1.5] for workload in slow.seconds})), 1e9, 2, "bfloat16")
    why = report.why_slower()
    assert set(why) == {"prefill 512", "decode 8"}
    assert "7 matrices are decoded for one dense product" in why["prefill 512"] and "each row by itself" in why["decode 8"]
    slow.forms = {"two products": 3}
    assert "3 matrices are two products each" in report.as_json()["why_slower"]["decode 8"]
    slow.forms = {}
    assert "noise, or in the architecture" in report.why_slower()["decode 8"]


@pytest.mark.parametrize(("option", "value"), [("--prefill", "many"), ("--decode", "0"), ("--decode", "")])
def test_a_list_that_is_none_is_refused(option, value, tmp_path):
    done = run_lrc("bench", tmp_path, option, value)
    assert done.code == 2 and option in done.err
