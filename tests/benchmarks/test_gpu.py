"""benchmarks/cost/gpu.py refuses where there is no GPU; its code runs in Triton's interpreter, where times mean nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from triton_here import INTERPRETED

SCRIPT = Path(gpu.__file__)


def once(products, x):
    for product in products:
        product(x)
    return 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_and_prints_no_figure(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "finds none" in done.stderr and "--check-here" in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; `make test-kernels` runs it")
@pytest.mark.slow
def test_its_code_runs(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "DTYPE", torch.float16)
    monkeypatch.setattr(gpu, "LAYERS", {"7B qkv": (128, [16, 16]), "7B o": (128, [32])})
    monkeypatch.setattr(gpu, "COLD", 0)
    monkeypatch.setattr(gpu, "ROWS", (1, 5))
    monkeypatch.setattr(
        gpu, "MODEL", {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    )
    monkeypatch.setattr(gpu, "CALIBRATION", {"samples": 4, "length": 32})
    monkeypatch.setattr(gpu, "microseconds", once)
    timed = list(gpu.time_products({"bandwidth": 1.0, "rate": 1.0}, gpu.ROWS, float("inf")))
    expected = {"dense", "low rank, kernel", "4 bits, kernel + rank", "dictionary, written out", "trellis, kernel (to 4)"}
    assert {one.case for one in timed} > expected
    assert all(one.error < 2e-3 for one in timed), [one for one in timed if one.error >= 2e-3]
    grams = [{"width": 8, "input": str(dtype), "way": way, "us": 1.0, "error": 0.0}
             for dtype in (torch.float32, torch.float16) for way in ("kernel", "float32", "TF32")]  # fmt: skip
    stages = gpu.time_compress()
    for seconds in stages.values():
        assert len(seconds) > 1 and 0 < sum(seconds.values()) - seconds["whole run"] <= seconds["whole run"], stages
    gpu.report(timed, grams, stages)
    assert "UP_TO" in capsys.readouterr().out
