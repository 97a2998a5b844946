"""Where the kernels of cuda/ can run in this process: in Triton's interpreter on the CPU (`make test-kernels`), or on a GPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter truncates where a GPU rounds to bfloat16
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
# errors relative to the largest value of the result, which is rounded once; sums are float32 sums
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def require_triton() -> None:
    """Skip the whole file where there is neither."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed; `make test-kernels` runs these", allow_module_level=True)
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1; `make test-kernels` runs these", allow_module_level=True)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error relative to the largest value expected; NaN where something was not written."""
    if not expected.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))
