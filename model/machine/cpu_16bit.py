"""16-bit products on processors that have no instructions for them: computed in float32, in place of torch's own.

torch multiplies 16-bit matrices on a processor by oneDNN, and oneDNN needs AVX-512 (or matrix units) for bfloat16, and more for
float16. On other processors, most desktops among them, torch uses loops that are 8 to 500 times slower than float32 (pytorch
issue 146508). Here factors are converted to float32 and multiplied, and the result is rounded once, as 16-bit instructions do.
A large weight is converted in slices that fit in the processor's cache, so that this costs a few percent of time and no memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_IN_CACHE = 2**20  # weights converted at a time: 4 MiB of float32
_TORCH = nn.functional.linear


@functools.cache
def slow_dtypes() -> frozenset[torch.dtype]:
    """The 16-bit dtypes that this processor has no instructions for."""
    return frozenset(dtype for dtype in (torch.bfloat16, torch.float16) if not onednn_multiplies(dtype))


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch computes products of a 16-bit dtype by oneDNN on this processor."""
    onednn: Any = torch.ops.mkldnn
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return torch.backends.mkldnn.is_available() and bool(getattr(onednn, asked[dtype])())


def replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """(module of torch, name in it, function that does the same in float32); none where no dtype is slow."""
    if not slow_dtypes():
        return []
    others = [name for name in ("addmm", "_grouped_mm") if hasattr(torch, name)]
    return [(nn.functional, "linear", linear), *((torch, name, widened(getattr(torch, name))) for name in others)]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`; slow 16-bit matrices are multiplied in float32 and the result is rounded once.

    For a backward pass it keeps the 16-bit factors, no float32 copies.
    """
    device = weight.device.type
    cast = torch.get_autocast_dtype(device) if device == "cpu" and torch.is_autocast_enabled(device) else None
    if cast in slow_dtypes() and input.dtype != torch.float64:  # autocast does not convert float64
        with torch.autocast(device, enabled=False):
            return linear(input.to(cast), weight.to(cast), None if bias is None else bias.to(cast))
    given = [input, weight] if bias is None else [input, weight, bias]
    if not _slow(given) or weight.ndim != 2 or input.numel() == input.shape[-1]:  # for a single row torch is as fast
        return _TORCH(input, weight, bias)
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        product: Tensor = _Linear.apply(input, weight, bias)
        return product
    return _product(input, weight, bias)


def widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A product of torch that converts slow 16-bit tensors to float32 and its result back."""

    @functools.wraps(function)
    def product(*args: Any, **kwargs: Any) -> Tensor:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.is_floating_point()]
        if not given or not _slow(given) or any(kwargs.get(name) is not None for name in ("out", "out_dtype")):
            return function(*args, **kwargs)
        wide = [_wide(each) for each in args]
        return function(*wide, **{name: _wide(each) for name, each in kwargs.items()}).to(given[0].dtype)

    return product


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _slow(tensors: Sequence[Tensor]) -> bool:
    """Whether these are plain tensors on the CPU, all of one slow dtype."""
    first = tensors[0].dtype
    return first in slow_dtypes() and all(
        each.dtype == first and each.device.type == "cpu" and type(each) in (Tensor, nn.Parameter) for each in tensors
    )


def _parts(weight: Tensor) -> list[slice]:
    step = max(1, _IN_CACHE // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide, parts = x.float(), _parts(weight)

    def outputs(part: slice) -> Tensor:
        return _TORCH(wide, weight[part].float(), None if bias is None else bias[part].float())

    if len(parts) == 1:
        return outputs(parts[0]).to(x.dtype)
    found = x.new_empty(*x.shape[:-1], len(weight))
    for part in parts:
        found[..., part] = outputs(part)
    return found


class _Linear(torch.autograd.Function):
    """`_product` with gradients in float32, rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the factors that need one, in their dtype."""
        x, weight = ctx.saved_tensors
        flat, of_x, of_weight, of_bias = gradients[0].flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            wide = torch.zeros(len(flat), weight.shape[1], dtype=torch.float32, device=flat.device)
            for part in _parts(weight):
                wide.addmm_(flat[:, part].float(), weight[part].float())
            of_x = wide.view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            inputs = x.flatten(0, -2).float()
            of_weight = torch.empty_like(weight)
            for part in _parts(weight):
                of_weight[part] = flat[:, part].T.float() @ inputs
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0, dtype=torch.float32).to(x.dtype)
        return of_x, of_weight, of_bias
