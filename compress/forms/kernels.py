"""Where the forms' modules call the GPU kernels of cuda/: each function multiplies by one, or says that none is to be taken.

Which one is decided from the device, the dtype and the number of rows (cuda/dispatch.py). Codes remain in memory as they are in
the file. The kernels' files import Triton, so they are imported here when one is first called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...cuda.dispatch import UP_TO, rows, why_not


def low_rank(module: Any, x: Tensor) -> Tensor | None:
    """`left (weight x) + bias` of a `LowRankLinear`; None: by torch's operations."""
    if rows(x) > UP_TO["low-rank"] or why_not(x, module.weight, module.left, module.bias):
        return None
    from ...cuda.grouped_low_rank import grouped_low_rank
    from ...cuda.grouped_low_rank import why_not as why_not_group

    out_features, rank = module.left.shape
    if why_not_group(x, module.weight, module.left, [rank]):
        return None
    y: Tensor = grouped_low_rank(x, module.weight, module.left.flatten(), [rank], [out_features], module.bias, None)
    return y


def coded(module: Any, x: Tensor, correction: nn.Module | None = None) -> Tensor | None:
    """`matrix x + correction(x) + bias` of a `QuantizedLinear`; None: by torch's operations."""
    steps = _steps(module)
    if why_not(x, module.weight, steps, module.bias):
        return None
    from ...cuda.packed_codes import Codes, codes_dense, codes_product
    from ...cuda.packed_codes import why_not as why_not_codes

    grid = module.grid
    zeros = None if grid.symmetric else module.zeros
    codes = Codes(
        module.weight, steps, zeros, grid.bits, grid.width(module.in_features), module.in_features, module.out_features
    )
    if why_not_codes(x, codes):
        return None
    if rows(x) > UP_TO["codes float32" if x.dtype == torch.float32 else "codes"]:
        y = nn.functional.linear(x, codes_dense(codes, x.dtype), module.bias)
        return y if correction is None else y + correction(x)
    right, left, residual = _factors(correction, x)
    if why_not_codes(x, codes, right, left):
        return None
    return codes_product(x, codes, right, left, module.bias, residual)


def why_not_coded(module: Any) -> str:
    """Why no kernel can multiply by the codes of a `QuantizedLinear`, whatever the input is; empty where one can."""
    steps = _steps(module)
    dtype = steps.dtype if steps.is_floating_point() else torch.float32
    with torch.no_grad():
        return why_not(steps.new_empty(0, dtype=dtype), module.weight)


def sparse(module: Any, z: Tensor) -> Tensor | None:
    """`codes z + bias` of a `DictionaryLinear`; None: by torch's operations."""
    if why_not(z, module.values, module.support, module.bias) or (starts := module.starts()) is None:
        return None
    from ...cuda.sparse_codes import Sparse, sparse_dense, sparse_product, why_not_product
    from ...cuda.sparse_codes import why_not as why_not_sparse

    codes = Sparse(
        module.values, module.support, starts if module.pattern == "free" else None, module.out_features, module.atoms
    )
    if why_not_sparse(z, codes):
        return None
    if rows(z) > UP_TO["dictionary"] or why_not_product(z, codes):
        return nn.functional.linear(z, sparse_dense(codes), module.bias)
    return sparse_product(z, codes, module.bias)


def trellis(code: Any, codes: Tensor, x: Tensor) -> Tensor | None:
    """The product of the tiles of a trellis `Code` with rotated and scaled inputs (..., in); None: by torch's operations."""
    if code.kind != "trellis" or rows(x) > UP_TO["trellis"] or why_not(x, codes):
        return None
    from ...cuda.trellis_codes import trellis_product
    from ...cuda.trellis_codes import why_not_product as why_not_trellis

    stored = _trellis(code, codes)
    if why_not_trellis(x, stored):
        return None
    y: Tensor = trellis_product(x, stored)
    return y


def trellis_matrix(code: Any, codes: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The matrix of whole tiles that the tiles of a trellis `Code` stand for; None: by torch's operations."""
    if code.kind != "trellis" or why_not(like := codes.new_empty(0, dtype=dtype), codes):
        return None
    from ...cuda.trellis_codes import trellis_dense
    from ...cuda.trellis_codes import why_not as why_not_trellis

    stored = _trellis(code, codes)
    return None if why_not_trellis(like, stored) else trellis_dense(stored, dtype)


def _trellis(code: Any, codes: Tensor) -> Any:
    from ...cuda.trellis_codes import Trellis
    from .codes.tables import FACTOR, trellis_unit

    tall, wide, _ = codes.shape
    return Trellis(codes.flatten(), trellis_unit(code.state_bits), tall, wide, code.bits, code.state_bits, FACTOR)


def _steps(module: Any) -> Tensor:
    steps: Tensor = module.exponents if module.grid.kind == "mxint" else module.scales
    return steps


def _factors(correction: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The right and the left factor of a correction that the kernel adds itself, or what any other correction adds."""
    if correction is None:
        return None, None, None
    weight, left = getattr(correction, "weight", None), getattr(correction, "left", None)
    if isinstance(left, Tensor) and isinstance(weight, Tensor) and correction.bias is None and left.device == x.device:
        return weight, left, None
    return None, None, correction(x)
