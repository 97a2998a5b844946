"""Codes of lrc in the block types of ggml: blocks of 32 numbers with a float16 step, and a float16 offset where they have one.

A type takes the codes as they are, so that nothing is quantized twice:

* Q4_0 holds step * (code - 8): symmetric codes of up to 4 bits. Q4_1 and Q5_1 hold step * code + offset: codes with zeros of up
  to 4 and 5 bits; the offset is rounded to float16.
* Q8_0 holds step * code with codes of -128 to 127: symmetric codes of 5 to 8 bits, and codes with zeros of 6 bits.
* 8 bits with zeros fit no type. They are quantized again, to Q8_0.

Source: github.com/ggml-org/ggml, ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compress.forms.grids import Grid
from ...errors import CheckpointError

BLOCK = 32
Bytes = NDArray[np.uint8]


def block_type(grid: Grid) -> Any:
    """The GGMLQuantizationType that holds the codes of a grid."""
    from gguf import GGMLQuantizationType as Type

    if grid.symmetric:
        return Type.Q4_0 if grid.bits <= 4 else Type.Q8_0
    return Type.Q4_1 if grid.bits <= 4 else Type.Q5_1 if grid.bits == 5 else Type.Q8_0


def is_exact(grid: Grid) -> bool:
    """Whether a type holds the codes as they are."""
    return grid.symmetric or grid.bits < 8


def why_not(grid: Grid, rows: int, columns: int) -> str:
    """Why blocks of 32 cannot hold a matrix (rows, columns) on this grid; empty where they can."""
    width = grid.width(columns)
    if columns % BLOCK:
        return f"rows of {columns} numbers, no multiple of {BLOCK}"
    return f"groups of {width} numbers, no multiple of {BLOCK}" if width % BLOCK else ""


def encoded(path: str, grid: Grid, codes: Tensor, steps: Tensor, zeros: Tensor | None) -> Bytes:
    """The blocks of a matrix, (out, bytes of a row) uint8.

    Args:
        path: of the module, for messages.
        grid: of the codes.
        codes: (out, in) uint8.
        steps: (out, groups) float32.
        zeros: (out, groups) uint8, or None for the middle code.

    Raises:
        CheckpointError: float16 has no value for a step.
    """
    import gguf

    rows, columns = codes.shape
    blocks, repeats = columns // BLOCK, grid.width(columns) // BLOCK
    step = steps.repeat_interleave(repeats, 1)[:, :blocks].reshape(-1, 1)
    middle = torch.full_like(steps, grid.middle) if zeros is None else zeros.float()
    zero = middle.repeat_interleave(repeats, 1)[:, :blocks].reshape(-1, 1)
    values = codes.reshape(-1, BLOCK).float()
    kind = block_type(grid)
    if not is_exact(grid):
        again: Bytes = gguf.quants.quantize(((values - zero) * step).reshape(rows, columns).numpy(), kind)
        return again
    halves = [_half(path, step)]
    if kind in (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q5_1):
        halves.append(_half(path, -zero * step, offset=True))
    elif kind == gguf.GGMLQuantizationType.Q4_0:
        values = values - zero + 8
    else:
        values = values - zero
    parts = [each.numpy().view(np.uint8) for each in halves] + _codes(values, kind.name)
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _half(path: str, values: Tensor, offset: bool = False) -> Tensor:
    """Values in float16, which must keep them to its own precision."""
    half = values.half()
    wrong = (half.float() - values).abs() > 2.0**-11 * values.abs()
    if offset:  # one below the smallest normal number is off by less than what a product in float16 loses
        wrong &= values.abs() > 2.0**-14
    if not torch.isfinite(half).all() or wrong.any():
        raise CheckpointError(
            f"'{path}': steps of {float(values.abs().min()):.3g} to {float(values.abs().max()):.3g} have no value in float16, "
            "in which GGUF stores them.",
            "Export to 'dense', and convert that with llama.cpp's convert_hf_to_gguf.py.",
        )
    return half


def _codes(values: Tensor, kind: str) -> list[Bytes]:
    """Codes (blocks, 32) as the bytes that follow a block's step: halves of a block share bytes."""
    if kind == "Q8_0":
        return [values.to(torch.int8).numpy().view(np.uint8)]
    codes = values.to(torch.uint8).numpy()
    low = codes & np.uint8(15)
    packed: list[Bytes] = [low[:, : BLOCK // 2] | (low[:, BLOCK // 2 :] << np.uint8(4))]
    if kind == "Q5_1":
        packed.insert(0, np.packbits(codes >> 4, axis=1, bitorder="little"))
    return packed
