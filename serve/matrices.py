"""The matrices of one linear layer of an engine, each in the form in which the result stores it.

Engines fuse matrices that read one input (q, k and v; gate and up) into one layer. lrc gives each its own form and rank, so a
layer here is a list of forms' modules. Right factors, of low-rank forms and of corrections, are stacked into one matrix: one
product for all of them, and then one per left factor. Nothing in this file knows an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.forms.base import LowRankLinear, Spec, build_module
from ..compress.forms.cpu.int4 import Packed, kernel_group, multiply
from ..compress.forms.quantized import QuantizedLinear, QuantizedLowRankLinear
from ..errors import CheckpointError


class Matrices(nn.Module):
    """`y = [W_0 x, W_1 x, …]`, the outputs one after another.

    Args:
        names: module path of each matrix in the result, for messages.
        specs: of their forms.
        in_features: of all.
        out_features: of each.
        dtype: of the floating-point tensors.

    Raises:
        CheckpointError: a spec does not fit its matrix.
    """

    def __init__(
        self, names: Sequence[str], specs: Sequence[Spec], in_features: int, out_features: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.names, self.in_features = tuple(names), in_features
        built = [
            _built(name, spec, in_features, rows, dtype) for name, spec, rows in zip(names, specs, out_features, strict=True)
        ]
        self.each = nn.ModuleList(built)
        self.requires_grad_(False)
        self.stacked: nn.Parameter | None = None
        self._ranks: list[int] = []
        self._wanted = {(i, path) for i, module in enumerate(self.each) for path, _ in module.named_parameters()}

    def paths(self) -> list[str]:
        """The names of tensors below a module's path that any of the matrices has: `weight`, `left`, `correction.left`."""
        return sorted({path for _, path in self._wanted})

    def dtype_of(self, path: str) -> torch.dtype:
        """The dtype of the tensor of this name in the first matrix that has one."""
        return next(held[path].dtype for module in self.each if path in (held := dict(module.named_parameters())))

    def fill(self, place: int, path: str, tensor: Tensor) -> None:
        """Set one tensor of the matrix with this index.

        Raises:
            CheckpointError: the form has no such tensor, or one of another shape or kind.
        """
        name = f"{self.names[place]}.{path}"
        held = dict(self.each[place].named_parameters()).get(path)
        unlike = held is not None and held.is_floating_point() != tensor.is_floating_point() and tensor.numel() > 0
        if held is None or held.shape != tensor.shape or unlike:  # an empty guard may be of any kind
            wanted = "no tensor of this name" if held is None else f"{tuple(held.shape)} {held.dtype}"
            raise CheckpointError(
                f"'{name}' is {tuple(tensor.shape)} {tensor.dtype}; its form has {wanted}.",
                "Weights and config.json do not belong together.",
            )
        held.data.copy_(tensor)
        if path.endswith("scales") and not torch.equal(held.double(), tensor.to(held.device).double()):
            raise CheckpointError(
                f"'{name}' has steps that {held.dtype} does not hold exactly.",
                f"Serve it in the result's own dtype, {tensor.dtype}.",
            )
        self._wanted.discard((place, path))

    def finish(self) -> None:
        """Bring the tensors into the order in which they are multiplied; called once, when all are there.

        Raises:
            CheckpointError: a tensor was not set.
        """
        if self._wanted:
            place, path = min(self._wanted)
            raise CheckpointError(
                f"{len(self._wanted)} tensors of compressed matrices are in no file, '{self.names[place]}.{path}' first.",
                "The result is incomplete, or the engine did not ask for them; check it with `lrc verify`.",
            )
        for module in self.modules():
            if isinstance(module, QuantizedLinear):
                module.pack()
        factors = [factor for module in self.each if (factor := _factors(module)) is not None]
        if factors:
            self._ranks = [factor.rank for factor in factors]
            self.stacked = nn.Parameter(torch.cat([factor.weight for factor in factors]), requires_grad=False)
            for factor in factors:  # the rows of the stack are the only copy
                factor.weight = nn.Parameter(factor.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., all outputs)."""
        low = [] if self.stacked is None else list(nn.functional.linear(x, self.stacked).split(self._ranks, dim=-1))
        outputs = []
        for module in self.each:
            factor = _factors(module)
            y = None if factor is module else _product(module, x)
            if factor is not None:
                corrected = nn.functional.linear(low.pop(0), factor.left, factor.bias)
                y = corrected if y is None else y + corrected
            assert y is not None
            outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _built(name: str, spec: Spec, in_features: int, out_features: int, dtype: torch.dtype) -> nn.Module:
    try:
        return build_module(spec, in_features, out_features, dtype)
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The result's quantization_config does not fit this model: '{name}' as {spec.get('kind')!r}: {error}",
            "Its config.json was changed, or it was written by a newer lrc.",
        ) from error


def _factors(module: nn.Module) -> LowRankLinear | None:
    """The two factors whose right one is stacked: a low-rank form, or the correction of codes."""
    found = module.correction if isinstance(module, QuantizedLowRankLinear) else module
    return found if isinstance(found, LowRankLinear) else None


def _product(module: Any, x: Tensor) -> Tensor:
    """What a module gives without a correction that is stacked."""
    if not isinstance(module, QuantizedLinear):
        y: Tensor = module(x)
        return y
    y = _of_codes(module, x)
    if isinstance(module, QuantizedLowRankLinear) and _factors(module) is None:
        y = y + _product_of_factors(module.correction, x)
    return y


def _product_of_factors(correction: Any, x: Tensor) -> Tensor:
    return _product(correction.left, _product(correction.right, x))


def _of_codes(module: QuantizedLinear, x: Tensor) -> Tensor:
    codes, scales = module._buffers.get("packed_codes"), module._buffers.get("packed_scales")
    if codes is None or scales is None or x.dtype != scales.dtype or not torch.compiler.is_compiling():
        return QuantizedLinear.forward(module, x)
    group = kernel_group(module.grid, module.in_features)
    assert group is not None
    y: Tensor = _packed(x, codes, scales, [module.out_features, group, module.grid.middle])
    return y if module.bias is None else y + module.bias


@torch.library.custom_op("lrc::packed", mutates_args=())
def _packed(x: Tensor, codes: Tensor, scales: Tensor, sizes: Sequence[int]) -> Tensor:
    """The product with packed codes as one operator for a compiler: which way it goes depends on the number of rows of x."""
    rows, group, middle = sizes
    return multiply(x, Packed(codes, scales, rows, group, middle), None).contiguous()


@_packed.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, sizes: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes[0])
