"""Compile every GPU kernel of cuda/ without a GPU, for compute capabilities 8.0, 9.0 and 10.0; shared memory must fit.

The kernels are launched as in use, on empty tensors, with Triton's driver replaced by one that names a target and stops before
the launch. Registers and spills are what ptxas says. Needs Triton (`make test-kernels` installs it beside the environment), and
TRITON_INTERPRET must not be set.

    python benchmarks/cost/ahead_of_time.py [--targets 80 90 100]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# bytes of shared memory that one block can have (CUDA programming guide, table of compute capabilities)
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
WIDTH, RANK, GROUP = 4096, 1232, 128


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target.

    Args:
        shared, spilled: in bytes; registers: of a thread.
        seconds: of the compilation.
    """

    kernel: str
    target: int
    tile: str
    shared: int
    registers: int
    spilled: int
    seconds: float


class Driver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(target: int) -> Iterator[list[Compiled]]:
    """While the context is open, a launch compiles its kernel for this target, and the list gets what came out."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[Compiled] = []
    launch, active = JITFunction.__getitem__, driver._active

    def compiled(kernel: Any, grid: Any) -> Callable[..., None]:
        def go(*args: Any, **sizes: Any) -> None:
            begun = time.perf_counter()
            made = kernel.run(*args, grid=grid, warmup=True, **sizes)
            tile = " ".join(f"{name}={int(value)}" for name, value in sizes.items())
            seconds = time.perf_counter() - begun
            name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
            found.append(Compiled(name, target, tile, made.metadata.shared, *_registers(made.asm["ptx"]), seconds))

        return go

    JITFunction.__getitem__ = compiled
    driver.set_active(Driver(target))
    try:
        yield found
    finally:
        JITFunction.__getitem__, driver._active = launch, active


def _registers(ptx: str) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills, from ptxas."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    name = "ptxas-blackwell" if (folder / "ptxas-blackwell").exists() else "ptxas"  # the newer one
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "kernel.ptx"
        source.write_text(ptx)
        arch = re.search(r"\.target (sm_\w+)", ptx)
        assert arch is not None
        call = [folder / name, "-v", f"--gpu-name={arch[1]}", source, "-o", Path(made) / "kernel.cubin"]
        said = subprocess.run(call, capture_output=True, text=True, check=True).stderr
    used, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert used is not None
    assert spilled is not None
    return int(used[1]), int(spilled[1])


def launch_all() -> None:
    """Launch every kernel in the variants that a 7B model needs."""
    half = torch.bfloat16
    for count, dtype in ((1, half), (4, half), (16, half), (64, half), (512, half), (16, torch.float32)):
        _low_rank(count, dtype)
    for bits, group, zeros, counts in ((4, GROUP, True, (1, 4, 16, 64)), (4, 32, False, (1, 16)), (3, GROUP, True, (1, 16))):
        _codes(bits, group, zeros, counts, half)
    for bits in (2, 5, 6, 8):
        _codes(bits, GROUP, False, (1, 16), half)
    _codes(4, 32, False, (1, 4), torch.float32, exponents=True)
    for free in (True, False):
        _sparse(free, half)
    for bits in (1, 2, 3, 4, 6):
        _trellis(bits, half)
    for dtype in (half, torch.float16, torch.float32):
        _gram(dtype)


def _low_rank(count: int, dtype: torch.dtype) -> None:
    from lrc.cuda.grouped_low_rank import grouped_low_rank

    ranks, outs = [RANK] * 3, [WIDTH] * 3
    right, left = torch.empty(sum(ranks), WIDTH, dtype=dtype), torch.empty(3 * RANK * WIDTH, dtype=dtype)
    residual = torch.empty(count, 3 * WIDTH, dtype=dtype)
    grouped_low_rank(torch.empty(count, WIDTH, dtype=dtype), right, left, ranks, outs, right[0].repeat(3), residual)


def _codes(bits: int, group: int, zeros: bool, counts: tuple[int, ...], dtype: torch.dtype, exponents: bool = False) -> None:
    from lrc.cuda.packed_codes import Codes, codes_dense, codes_product

    groups = WIDTH // group
    codes = Codes(
        torch.empty(WIDTH * WIDTH * bits // 8, dtype=torch.uint8),
        torch.empty(WIDTH, groups, dtype=torch.uint8 if exponents else dtype),
        torch.empty(WIDTH * (-(-groups * bits // 8)), dtype=torch.uint8) if zeros else None,
        bits,
        group,
        WIDTH,
        WIDTH,
    )
    right, left = torch.empty(32, WIDTH, dtype=dtype), torch.empty(WIDTH, 32, dtype=dtype)
    for count in counts:
        codes_product(torch.empty(count, WIDTH, dtype=dtype), codes, right, left)
    codes_dense(codes, dtype)


def _sparse(free: bool, dtype: torch.dtype) -> None:
    from lrc.cuda.sparse_codes import Sparse, sparse_dense, sparse_product

    atoms = 1572
    starts = torch.empty(WIDTH, dtype=torch.int32) if free else None
    sparse = Sparse(
        torch.empty(WIDTH * atoms // 2, dtype=dtype), torch.empty(WIDTH * atoms // 8, dtype=torch.uint8), starts, WIDTH, atoms
    )
    for count in (1, 4):
        sparse_product(torch.empty(count, atoms, dtype=dtype), sparse)
    sparse_dense(sparse)


def _trellis(bits: int, dtype: torch.dtype) -> None:
    from lrc.compress.forms.codes.tables import FACTOR
    from lrc.cuda.trellis_codes import Trellis, trellis_dense, trellis_product

    tiles = WIDTH // 16
    codes = Trellis(torch.empty(tiles * tiles * 32 * bits, dtype=torch.uint8), 1.0, tiles, tiles, bits, 12, FACTOR)
    for count in (1, 4):
        trellis_product(torch.empty(count, WIDTH, dtype=dtype), codes)
    trellis_dense(codes, dtype)


def _gram(dtype: torch.dtype) -> None:
    from lrc.cuda.gram import gram_

    gram_(torch.empty(WIDTH, WIDTH), torch.empty(2048, WIDTH, dtype=dtype), 0.5, 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", choices=list(SHARED), default=list(SHARED))
    targets = parser.parse_args().targets
    from lrc.cuda.dispatch import FOUND, INTERPRETED

    if not FOUND or INTERPRETED:
        sys.exit("Triton is not installed." if not FOUND else "TRITON_INTERPRET is set: the interpreter compiles nothing.")
    wrong = 0
    print(f"{'kernel':<30}{'target':>7}{'shared':>9}{'of':>9}{'registers':>11}{'spilled':>9}{'seconds':>9}  tile")
    for target in targets:
        with compiling(target) as found, torch.no_grad():
            launch_all()
        wrong += sum(one.shared > SHARED[target] for one in found)
        for one in dict.fromkeys(found):
            numbers = f"{one.shared:>9}{SHARED[target]:>9}{one.registers:>11}{one.spilled:>9}{one.seconds:>9.1f}"
            print(f"{one.kernel:<30}{'sm_' + str(target):>7}{numbers}  {one.tile}", flush=True)
    print(f"{wrong} kernels need more shared memory than there is" if wrong else "every kernel compiles and fits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
