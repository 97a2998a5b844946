"""Running gram at the rate of tensor cores, with the error of float32: value = beta value + alpha xᵀ x, x (tokens, n).

Tensor cores multiply 16-bit numbers exactly into float32 sums. A float16 or bfloat16 input goes through them as it is. A
float32 input is the sum of three bfloat16 parts of eight significant bits each, high + middle + low, and the six products of
parts whose size is at least 2^-16 of the largest are summed; those left out are below float32's own rounding. TF32, with eleven
significant bits, loses 2^-11 of each factor. (The split is that of Henry, Tang & Heinecke 2019, "Leveraging the bfloat16
artificial intelligence datatype for higher-precision computations".)

Tensor cores add with less care than float32's rounding. The sums of `CHUNK` tokens are therefore added to the total outside of
them.

Only tiles on and above the diagonal are computed: what is below it in `value` is not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:  # transformers demands what a copied file imports, but for try blocks; dispatch.py says when this file is imported
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("this file needs Triton: pip install 'lrc[triton]'") from error

from .dispatch import INTERPRETED, operator
from .dispatch import why_not as why_not_here

CHUNK = 256  # tokens whose products are summed by tensor cores alone


def why_not(value: Tensor, x: Tensor) -> str:
    """Why the kernel cannot take these tensors; empty where it can."""
    if value.dtype != torch.float32 or not value.is_contiguous():
        return "the gram is no contiguous float32 matrix"
    return why_not_here(x, value)


def reference(value: Tensor, x: Tensor, beta: float, alpha: float) -> None:
    """What `gram_` does, by torch's operations, below the diagonal too."""
    value.addmm_(x.to(value.dtype).T, x.to(value.dtype), beta=beta, alpha=alpha)


@triton.jit
def _dot(a, b, total, WIDE: tl.constexpr):
    if WIDE:  # the interpreter multiplies bfloat16 wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(tl.trans(a), b, total, input_precision="ieee")


@triton.jit
def _part(x):
    part = x.to(tl.bfloat16)
    return part, x - part.to(tl.float32)


@triton.jit
def _gram(
    value, x, tokens, width, stride, beta, alpha,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    across, down = tl.program_id(0), tl.program_id(1)
    if down > across:
        return
    i, j, t = down * BN + tl.arange(0, BN), across * BN + tl.arange(0, BN), tl.arange(0, BT)
    total = tl.zeros((BN, BN), tl.float32)
    for chunk in range(0, tokens, BT * STEPS):
        sums = tl.zeros((BN, BN), tl.float32)
        for step in range(STEPS):
            token = chunk + step * BT + t
            line = x + token.to(tl.int64)[:, None] * stride
            a = tl.load(line + i[None, :], mask=(token < tokens)[:, None] & (i < width)[None, :], other=0.0)
            b = tl.load(line + j[None, :], mask=(token < tokens)[:, None] & (j < width)[None, :], other=0.0)
            if SPLIT:
                a_high, rest = _part(a)
                a_middle, rest = _part(rest)
                a_low = rest.to(tl.bfloat16)
                b_high, rest = _part(b)
                b_middle, rest = _part(rest)
                b_low = rest.to(tl.bfloat16)
                # the smallest first
                sums = _dot(a_low, b_high, sums, WIDE)
                sums = _dot(a_high, b_low, sums, WIDE)
                sums = _dot(a_middle, b_middle, sums, WIDE)
                sums = _dot(a_middle, b_high, sums, WIDE)
                sums = _dot(a_high, b_middle, sums, WIDE)
                sums = _dot(a_high, b_high, sums, WIDE)
            else:
                sums = _dot(a, b, sums, WIDE)
        total += sums
    at = value + i.to(tl.int64)[:, None] * width + j[None, :]
    here = (i < width)[:, None] & (j < width)[None, :]
    total *= alpha
    if beta != 0.0:
        total += beta * tl.load(at, mask=here, other=0.0)
    tl.store(at, total, mask=here)


def _fake(value: Tensor, x: Tensor, beta: float, alpha: float) -> None:
    return None


@operator("gram_", _fake, mutates=("value",))
def gram_(value: Tensor, x: Tensor, beta: float, alpha: float) -> None:
    """Add `alpha xᵀ x` to `beta value` in place, on and above the diagonal; `why_not` says where it cannot.

    Where beta is 0, what was in `value` does not matter.

    Args:
        value: (n, n) float32.
        x: (tokens, n).
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    split = x.dtype == torch.float32
    size = {"BT": 32, "BN": 64, "STEPS": CHUNK // 32} if split else {"BT": 64, "BN": 128, "STEPS": CHUNK // 64}
    tiles = triton.cdiv(len(value), size["BN"])
    if tiles:
        given = (value, x, len(x), len(value), x.stride(0), float(beta), float(alpha))
        _gram[tiles, tiles](*given, SPLIT=split, WIDE=INTERPRETED, **size, num_warps=4 if split else 8, num_stages=3)
