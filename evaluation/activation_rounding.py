"""Activation quantization, simulated: the inputs of every matrix of the layers, compressed or dense, are rounded.

This measures methods that quantize weights and activations (W4A8). Rounding is done in float32 and the product in the model's
own dtype, which represents every value of `mxint8` exactly and those of `int8` to its precision. Nothing becomes faster.

* `int8`: symmetric, one step per token, largest magnitude / 127 (W8A8 as in SmoothQuant, arXiv 2211.10438, eq. 1).
* `mxint8`: blocks of 16 along the channels share a step that is a power of two, as LQER rounds (arXiv 2402.02446, §4.1; OCP
  Microscaling Formats v1.0): with e the exponent of the block's largest magnitude, step = 2^(e - 6), codes -128 to 127.

Embeddings, the output head and routers are not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.architecture import find_layers
from ..compress import forms
from ..compress.forms import experts
from ..compress.forms.base import linear_shape
from ..errors import EvaluationError
from ..model.view import number_of_experts

BLOCK = 16


def int8(x: Tensor) -> Tensor:
    """(…, channels) with every token rounded to 255 points from minus to plus its largest magnitude; in x's dtype."""
    wide = x.float()
    step = wide.abs().amax(-1, keepdim=True) / 127
    step = torch.where(step == 0, 1.0, step)
    return ((wide / step).round() * step).to(x.dtype)


def mxint8(x: Tensor) -> Tensor:
    """(…, channels) with every block of 16 channels (the last may be shorter) rounded to its power of two; in x's dtype."""
    channels = x.shape[-1]
    blocks = nn.functional.pad(x.float(), (0, -channels % BLOCK)).unflatten(-1, (-1, BLOCK))
    exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1 - 6
    step = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.clamp(-126, 127))
    return ((blocks / step).round().clamp(-128, 127) * step).flatten(-2)[..., :channels].to(x.dtype)


ROUNDINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "int8": (int8, "int8, symmetric, per token"),
    "mxint8": (mxint8, f"mxint8, blocks of {BLOCK} channels"),
}


@contextmanager
def rounded_activations(model: Any, kind: str | None) -> Iterator[dict[str, Any]]:
    """While the context is open, the matrices of the model's layers read rounded inputs; gives the protocol's entries.

    Args:
        model: a causal language model, loaded whole; compressed or not.
        kind: of `ROUNDINGS`; None rounds nothing.

    Raises:
        EvaluationError: the layers hold no matrix that lrc knows.
    """
    if kind is None:
        yield {"activations": "not quantized"}
        return
    rounding, said = ROUNDINGS[kind]
    alone, fused = _matrices(model)
    if not alone and not fused:
        raise EvaluationError("No matrix was found whose inputs could be quantized.", "Leave --activations out.")

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(args[0]), *args[1:])

    before = getattr(model.config, "_experts_implementation", None)
    with ExitStack() as stack:
        for module in alone:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        if fused:
            experts.register()
            model.set_experts_implementation(experts.IMPLEMENTATION)
            stack.callback(model.set_experts_implementation, before)
            stack.enter_context(experts.reading_through(rounding))
        number = len(alone) + sum(experts.number_of_matrices(module) for module in fused)
        yield {"activations": said, "matrices_that_read_rounded_activations": number}


def _matrices(model: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules of the layers that multiply by a matrix (a form is one), and the modules of fused experts."""
    _, layers = find_layers(model, "this model")
    router = number_of_experts(model.config)
    found: list[nn.Module] = []
    fused: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        """Collect the outermost such modules of this one."""
        if experts.expert_parameters(module):
            fused.append(module)  # the forms of its experts get their inputs from it
            return
        shape = linear_shape(module) or _form_shape(module)
        if shape is None:
            for child in module.children():
                look(child)
        elif shape[0] != router:
            found.append(module)

    for layer in layers:
        look(layer)
    return found, fused


def _form_shape(module: Any) -> tuple[int, int] | None:
    """(out, in) of the module of a form, None for any other."""
    ours = type(module).__module__.startswith(f"{forms.__name__}.") and hasattr(module, "in_features")
    return (module.out_features, module.in_features) if ours else None
