"""Searching a size by the perplexity that may be lost: what is found, what it says, what it survives."""

from __future__ import annotations

import json
import math

import pytest
import torch
from commandline import lrc_ok, run_lrc
from tiny import tiny_text

from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.model.likelihood import window_nll
from lrc.model.view import ModelView
from lrc.run import search
from lrc.run.losses import held_out
from lrc.run.losses.held_out import perplexity
from lrc.run.search import STEPS


@pytest.fixture
def command(tiny_checkpoints, tiny_text_file, tmp_path):
    def line(family="llama", rise="1%", recipe="svd-llm", out="out"):
        source = ["--calibration", f"text:{tiny_text_file}", "--samples", 4, "--length", 32]
        return [
            "compress",
            tiny_checkpoints(family),
            "--out",
            tmp_path / out,
            "--recipe",
            recipe,
            *source,
            "--max-ppl-increase",
            rise,
        ]

    return line


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_streamed_perplexity_is_that_of_the_model_held_whole(family, tiny_checkpoints, monkeypatch):
    monkeypatch.setattr(held_out, "_AT_ONCE", 5 * 96)  # a few tokens' logits at a time
    folder = str(tiny_checkpoints(family))
    windows = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(1))
    model, _ = open_model(folder)
    with torch.no_grad():
        expected = math.exp(float(window_nll(model, windows, "here", 0).sum()) / (3 * 23))
    assert perplexity(ModelView(locate(folder)), windows, [torch.device("cpu")]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("recipe", ["svd-llm", "lrc-fast"])
def test_the_largest_ratio_that_stays_within_the_rise(recipe, command, tmp_path, monkeypatch):
    measured = {}
    real = search._Search._trial
    monkeypatch.setattr(search._Search, "_trial", lambda self, ratio: measured.setdefault(ratio, real(self, ratio)))
    result = lrc_ok(*command(recipe=recipe, rise="1%"))
    record = json.loads((tmp_path / "out" / "lrc.json").read_text())
    found = record["searched"]
    assert found["after"] <= found["before"] * 1.01
    assert measured[found["ratio"]] == found["after"]
    following = found["ratio"] + 1 / STEPS
    assert following == 1 or measured[following] > found["before"] * 1.01
    assert found["evaluations"] == len(measured) <= 7
    assert f"searched: ratio {found['ratio']:.4f}" in result
    assert record["ratio"] == pytest.approx(found["ratio"], abs=0.05)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")) in ([], [".lock"])
    again = lrc_ok(*command(recipe=recipe, rise="1%"))
    assert "already" in again and len(measured) == found["evaluations"]


def test_what_was_measured_is_not_measured_again(command, tmp_path, monkeypatch):
    trials = []
    real = search._Search._trial

    def interrupted(self, ratio):
        trials.append(ratio)
        if len(trials) == 4:
            raise KeyboardInterrupt
        return real(self, ratio)

    monkeypatch.setattr(search._Search, "_trial", interrupted)
    assert run_lrc(*command()).code == 130
    lrc_ok(*command())
    assert len(trials) == len(set(trials)) + 1, "only the interrupted trial was made twice"


def test_a_rise_that_no_step_stays_within(command, monkeypatch):
    monkeypatch.setattr(search._Search, "_trial", lambda self, ratio: 1e9)
    result = run_lrc(*command())
    assert result.code == 2 and "lets perplexity rise from" in result.err and "1.00% is allowed" in result.err


def test_where_nothing_is_searched(command, tmp_path, tiny_checkpoints, tiny_text_file):
    plan = lrc_ok("plan", tiny_checkpoints("llama"), "--recipe", "svd-llm", "--set", "max_ppl_increase=5%")
    assert "the size is searched after calibration" in plan
    result = run_lrc(*command(recipe="block-influence"))
    assert result.code == 2 and "this recipe has no method" in result.err
    assert "held_out" in run_lrc(*command(), "--set", "calibration.held_out=0").err
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(400))
    swept = run_lrc(
        "sweep", tiny_checkpoints("llama"), "--recipes", "svd-llm", "--out", tmp_path / "table", "--tasks", f"text:{text}",
        "--set", "max_ppl_increase=5%",
    )  # fmt: skip
    assert swept.code == 2 and swept.err
