"""The quick perplexity at the end of a run: right, on text that no statistic saw, and never in the way of a result."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from commandline import lrc_ok, run_lrc

from lrc.calibrate.data import NO_TEXT, Calibration, evaluation_text
from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.errors import ModelError
from lrc.model.likelihood import window_nll
from lrc.model.view import ModelView
from lrc.run.losses import held_out


@pytest.fixture(scope="module")
def pair(tiny_checkpoints, tmp_path_factory) -> tuple[Path, Path]:
    """A model, and a result of it."""
    model, out = tiny_checkpoints("llama", num_hidden_layers=2), tmp_path_factory.mktemp("pair") / "out"
    printed = lrc_ok("compress", model, "--recipe", "svd", "--ratio", 0.4, "--out", out, "--no-check")
    assert "perplexity" not in printed
    return model, out


def whole(folder: Path, windows: torch.Tensor) -> float:
    """Perplexity of a model that is loaded whole."""
    model, _ = open_model(str(folder))
    with torch.inference_mode():
        return math.exp(float(window_nll(model, windows, "x", 0).sum()) / (windows.numel() - len(windows)))


def test_a_quick_check_is_the_perplexity_of_both_models(pair):
    model, out = pair
    held = torch.arange(3, 131).view(2, 64)
    for calibration in (NO_TEXT, Calibration(torch.empty(0, 2, dtype=torch.int64), "", (), held)):
        found = held_out.quick_check(ModelView(locate(str(model))), out, calibration, [torch.device("cpu")])
        windows = held
        if calibration is NO_TEXT:
            ids = locate(str(model)).tokenizer()(evaluation_text("pydoc-topics").text[:9000])["input_ids"]
            windows = torch.tensor(ids[:512]).view(2, 256)
        assert found.tokens == windows.numel() - 2
        assert math.isclose(found.before, whole(model, windows), rel_tol=1e-5)
        assert math.isclose(found.after, whole(out, windows), rel_tol=1e-5)
        assert ("held-out" in found.text) == (calibration is not NO_TEXT)


def test_a_result_is_finished_also_where_the_check_cannot_be_made(pair, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise ModelError("no tokenizer could be read")

    monkeypatch.setattr(held_out, "quick_check", refuse)
    result = run_lrc("compress", pair[0], "--recipe", "svd", "--ratio", 0.3, "--out", tmp_path / "out")
    assert result.code == 0 and "note: not checked by perplexity: no tokenizer could be read" in result.err
    assert "its logits are finite" in result.out
