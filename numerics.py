"""What computes products on a processor: the fastest library that keeps float32, and float32 inside 16-bit attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

_FEW_QUERIES = 256  # with fewer, attention is many small products, and oneDNN takes longer to begin one than MKL to do it


def full_precision() -> None:
    """Grams in float32 mean float32: TensorFloat-32 keeps 10 bits of mantissa. To be called before any work on a model.

    torch has two libraries for float32 products on a processor. MKL, which it takes by itself, leaves half of what processors
    of another maker can do; oneDNN is taken only where fewer bits are allowed, though without matrix tiles it uses none of
    that leave. So it is given where it turns out to keep every bit, and 16-bit attention, which torch computes no faster than
    float32 there, then runs in float32. With a GPU, all stays as torch has it.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if not torch.cuda.is_available() and _onednn_keeps_float32():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        _register_attention()


def float32_products() -> str:
    """How float32 products are computed here, for protocols."""
    by_onednn = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # the getter refuses where libraries are told apart
    return "highest, by oneDNN" if by_onednn else torch.get_float32_matmul_precision()


@functools.cache
def _onednn_keeps_float32() -> bool:
    """Whether oneDNN, allowed to round the factors of a float32 product to bfloat16, does not: one look at its products."""
    if not torch.backends.mkldnn.is_available():
        return False
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        generator = torch.Generator().manual_seed(0)
        for rows, inner, columns in ((2, 64, 64), (64, 64, 512), (512, 576, 1536)):
            # Of 12 bits each: a product is exact in float32 and none is in bfloat16, which has 8.
            a, b = (torch.randint(2048, 4096, size, generator=generator).float() for size in ((rows, inner), (inner, columns)))
            exact = a.double() @ b.double()
            if ((a @ b).double() - exact).abs().max() > 1e-5 * exact.abs().max():
                return False
        return True
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@functools.cache
def _register_attention() -> None:
    """transformers' attention by `scaled_dot_product_attention`, of many tokens in float32, of few as torch has it."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """As `sdpa_attention_forward`, whose arguments and result it has."""
        dtype = query.dtype
        if query.device.type != "cpu" or dtype == torch.float64:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if query.shape[-2] < _FEW_QUERIES:
            torch.backends.mkldnn.matmul.fp32_precision = "ieee"
            try:
                return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
            finally:
                torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
        return output.to(dtype), None

    AttentionInterface.register("sdpa", attention)
