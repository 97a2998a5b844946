"""Every kernel compiles for the GPUs that people have, in the variants of a 7B model, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_here import require_triton

require_triton()
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "cost" / "ahead_of_time.py"


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_every_kernel_compiles_and_its_shared_memory_fits(target, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    call = [sys.executable, str(SCRIPT), "--targets", str(target)]
    done = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "every kernel compiles and fits" in done.stdout
