"""What decides between a kernel and torch's operations, without Triton and without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from triton_here import INTERPRETED

from lrc.compress.forms.base import build_module
from lrc.compress.forms.quantized import QuantizedLinear
from lrc.cuda import dispatch

GRID = {"bits": 4, "group_size": 32, "kind": "int", "symmetric": False}


def test_without_triton_nothing_is_a_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "FOUND", False)
    assert "lrc[triton]" in dispatch.why_not(torch.zeros(1, 4))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of the CPU")
def test_another_device_is_torchs(monkeypatch):
    monkeypatch.setattr(dispatch, "FOUND", True)
    assert "not for cpu" in dispatch.why_not(torch.zeros(1, 4))
    assert "not for meta" in dispatch.why_not(torch.zeros(1, 4, device="meta"))


def test_what_makes_a_kernel_impossible(monkeypatch):
    monkeypatch.setattr(dispatch, "FOUND", True)
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    x = torch.zeros(2, 4)
    assert dispatch.why_not(x) == ""
    assert "float64" in dispatch.why_not(x.double())
    assert "several devices" in dispatch.why_not(x, None, torch.zeros(1, device="meta"))
    weight = torch.zeros(1, requires_grad=True)
    assert "gradient" in dispatch.why_not(x, weight)
    with torch.no_grad():
        assert dispatch.why_not(x, weight) == ""


def test_codes_on_another_device_say_why_they_are_decoded():
    spec = {"kind": "quantized", "grid": GRID, "bias": False}
    with torch.device("meta"):
        module = build_module(spec, 64, 8)
    assert isinstance(module, QuantizedLinear)
    assert module.why_unpacked() == dispatch.why_not(torch.zeros(0, device="meta")) != ""
    assert not module.pack()


def test_sizes():
    assert [dispatch.power_of_two(number) for number in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert [dispatch.alignment(*numbers) for numbers in ((), (0,), (1232, 64), (20, 8), (6, 0), (5,))] == [16, 16, 16, 4, 2, 1]
    assert dispatch.rows(torch.zeros(2, 3, 5)) == 6 and dispatch.rows(torch.zeros(2, 0)) == 0


def test_multiplying_by_forms_loads_no_triton(tmp_path):
    code = "import torch; from lrc.compress.forms.base import LowRankLinear; LowRankLinear(4, 4, 2, False)(torch.zeros(1, 4)); "
    code += "import sys; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" or INTERPRETED
