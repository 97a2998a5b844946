"""When a kernel of this folder is taken instead of torch's operations, and what it needs to run at all.

The kernels' own files import Triton; this one does not. They are imported only where `why_not` found nothing.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

FOUND = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter: kernels run on the CPU, to be tested there
CAPABILITY = 8  # the first with products of bfloat16 and asynchronous copies
# of the operators; a copy of this file beside a checkpoint (export/self_contained.py) has a namespace of its own
NAMESPACE = "lrc" if __name__ == "lrc.cuda.dispatch" else re.sub(r"\W", "_", __name__)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The largest number of rows of input for which a kernel is taken; with more rows torch's operations are. 0: never.
#
# ESTIMATES, not measured: no GPU was at hand. They follow from bytes and operations (docs/kernels.md) and are low on purpose: a
# kernel is taken only where it reads much less memory than torch's operations do. `benchmarks/cost/gpu.py` measures the
# crossovers and prints both tables anew.
UP_TO = {
    "low-rank": 0,  # one matrix alone: two launches, as torch has
    "low-rank group": 16,  # matrices that read one input: two launches in place of two for each matrix
    "codes": 64,  # codes are read packed; with more rows they are written out once for a dense product
    "codes float32": 4,  # no tensor cores
    "dictionary": 4,
    "trellis": 4,
}
# The smallest width from which a gram is the kernel's, by its input. None: never, until its error has been seen on a GPU.
GRAM_FROM: dict[str, int | None] = {"float32": None, "16 bit": None}


def why_not(x: Tensor, *others: Tensor | None) -> str:
    """Why no kernel can take this input and these other tensors; empty where one can.

    Args:
        x: the input; kernels have no gradient.
        others: tensors that must be on its device.
    """
    if not FOUND:
        return "Triton is not installed (pip install 'lrc[triton]')"
    if not (INTERPRETED and x.device.type == "cpu") and (missing := _why_not_device(x.device)):
        return missing
    if x.dtype not in DTYPES:
        return f"kernels do not compute in {str(x.dtype).removeprefix('torch.')}"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *others)):
        return "kernels have no gradient"
    if any(tensor is not None and tensor.device != x.device for tensor in others):
        return "the tensors are on several devices"
    return ""


def _why_not_device(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"kernels are for NVIDIA GPUs, not for {device.type if torch.version.hip is None else 'ROCm'}"
    if torch.cuda.get_device_properties(device).major < CAPABILITY:
        return f"kernels need a GPU of compute capability {CAPABILITY}.0 or later"
    return ""


def rows(x: Tensor) -> int:
    """Rows of an input (..., n)."""
    return x.numel() // max(1, x.shape[-1])


def operator(name: str, fake: Callable[..., Any], mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a launching function as an operator, so that torch.compile and CUDA graphs capture it whole.

    Outside torch.compile the function is called directly: a call by way of the operator takes longer than the launch itself.

    Args:
        name: of the operator.
        fake: the same signature; returns empty tensors of the result's shape and dtype.
        mutates: names of the arguments that are written to.
    """

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.library.custom_op(f"{NAMESPACE}::{name}", launch, mutates_args=tuple(mutates))
        compiled.register_fake(fake)

        @functools.wraps(launch)
        def call(*args: Any) -> Any:
            return compiled(*args) if torch.compiler.is_compiling() else launch(*args)

        return call

    return register


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def alignment(*numbers: int) -> int:
    """The largest power of two up to 16 that divides all of these numbers."""
    return next(size for size in (16, 8, 4, 2, 1) if not any(number % size for number in numbers))
