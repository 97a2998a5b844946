"""How products are computed while lrc runs: float32 keeps all its bits, by the processor's fastest library that does so."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ContextDecorator, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .cpu_16bit import onednn_multiplies, replacements

_FEW_QUERIES = 256  # with fewer, attention is many small products, and oneDNN takes longer to start one than MKL to compute it
_BACKENDS: Any = torch.backends  # whose types name no precisions
_ONEDNN = _BACKENDS.mkldnn.matmul
_KEPT = "ieee"
_FEWER_BITS = "bf16"


class _FullPrecision(ContextDecorator):
    """Float32 products in full float32 while the context is open or the decorated function runs; then settings are restored.

    Grams in TensorFloat-32 would keep 10 bits of mantissa. On a processor torch has two libraries for float32 products. MKL,
    its default, reaches half the speed of processors that are not Intel's. torch uses oneDNN only where products may round
    their factors to bfloat16, but on processors without matrix tiles oneDNN does not round them. So rounding is allowed where a
    test shows that oneDNN keeps every bit, and attention of many 16-bit tokens, which torch computes no faster than float32
    there, is computed in float32. On a machine with a GPU, torch's default for the processor stays. On a processor without
    16-bit instructions, 16-bit products are computed in float32 (cpu_16bit.py).

    The context may be nested and open in several threads; the last one to close it restores the settings.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._before = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._open == 0:
                self._before = _set()
            self._open += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                self._before.close()


full_precision = _FullPrecision()


def _set() -> ExitStack:
    """Set everything; closing the returned stack restores it."""
    with ExitStack() as stack:

        def change(backend: Any, precision: str) -> None:
            """A backend's float32 precision from now on."""
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = precision

        for backend in (_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn):
            change(backend, _KEPT)
        for module, name, function in replacements():
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        exact = not torch.cuda.is_available() and _onednn_keeps_float32()
        change(_ONEDNN, _FEWER_BITS if exact else _KEPT)
        if exact:
            from transformers import AttentionInterface

            before = AttentionInterface()["sdpa"]
            stack.callback(AttentionInterface.register, "sdpa", before)
            AttentionInterface.register("sdpa", attention_by(before))
        return stack.pop_all()


def float32_products() -> str:
    """How float32 products are computed now, for benchmark records."""
    precision: str = _ONEDNN.fp32_precision
    return "highest, by oneDNN" if precision == _FEWER_BITS else "highest" if precision == _KEPT else precision


@functools.cache
def _onednn_keeps_float32() -> bool:
    """Whether oneDNN keeps the bits of float32 factors although it may round them to bfloat16; tested on a few products."""
    if not onednn_multiplies(torch.bfloat16):  # torch would still use MKL
        return False
    before = _ONEDNN.fp32_precision
    _ONEDNN.fp32_precision = _FEWER_BITS
    try:
        generator = torch.Generator().manual_seed(0)
        for rows, inner, columns in ((2, 64, 64), (64, 64, 512), (512, 576, 1536)):
            # Factors of 12 bits: each product is exact in float32, and none is in bfloat16, which has 8.
            a, b = (torch.randint(2048, 4096, size, generator=generator).float() for size in ((rows, inner), (inner, columns)))
            exact = a.double() @ b.double()
            if ((a @ b).double() - exact).abs().max() > 1e-5 * exact.abs().max():
                return False
        return True
    finally:
        _ONEDNN.fp32_precision = before


def attention_by(sdpa: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Attention where oneDNN keeps float32: in float32 for many tokens, by MKL for few.

    Args:
        sdpa: transformers' attention by `scaled_dot_product_attention`, whose arguments and result the function has.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """As `sdpa`."""
        dtype = query.dtype
        if query.device.type != "cpu" or dtype == torch.float64:
            return sdpa(module, query, key, value, attention_mask, **options)
        if query.shape[-2] < _FEW_QUERIES:
            _ONEDNN.fp32_precision = _KEPT
            try:
                return sdpa(module, query, key, value, attention_mask, **options)
            finally:
                _ONEDNN.fp32_precision = _FEWER_BITS
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        output, _ = sdpa(module, query.float(), key.float(), value.float(), attention_mask, **options)
        return output.to(dtype), None

    return attention
