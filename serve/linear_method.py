"""The linear method that vLLM and SGLang share: both create, load and multiply through an object of this shape.

Engines hand every tensor of a checkpoint to the parameter of its name. Those parameters are empty here: their loaders put the
tensor into the form of the right matrix, and they are removed when all tensors are there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .matrices import Matrices
from .result import Result, place_of

FORM_BIAS = "form_bias"  # a bias that a form has and the model's own layer has not: engines have another meaning for `bias`


class LinearMethod:
    """Creates, fills and multiplies by the matrices of one layer; every layer has its own.

    Args:
        result: the forms.
        names: module paths of the matrices that the layer fuses.
        bias_flag: the attribute by which the engine's layer says that it has a bias of its own.
    """

    def __init__(self, result: Result, names: list[str], bias_flag: str) -> None:
        self.result, self.names, self.bias_flag = result, names, bias_flag

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register an empty parameter under each name of a tensor; its loader fills the matrices."""
        has_bias = bool(getattr(layer, self.bias_flag))
        self.matrices = self.result.matrices(
            self.names, input_size_per_partition, output_partition_sizes, params_dtype, has_bias
        )
        self.paths = self.matrices.paths()
        for path in self.paths:
            parent, leaf = layer, path
            while "." in leaf:
                part, _, leaf = leaf.partition(".")
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.register_parameter(FORM_BIAS if path == "bias" else leaf, _receiver(self.matrices, path))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the empty parameters by the matrices."""
        if "matrices" in layer._modules:
            return
        self.matrices.finish()
        for path in self.paths:
            name = FORM_BIAS if path == "bias" else path.partition(".")[0]
            held: dict[str, Any] = layer._modules if "." in path else layer._parameters
            held.pop(name, None)
        layer.add_module("matrices", self.matrices)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out)."""
        matrices: nn.Module = layer.get_submodule("matrices")
        y: Tensor = matrices(x)
        return y if bias is None else y + bias


def _receiver(matrices: Matrices, path: str) -> nn.Parameter:
    def load(_: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
        matrices.fill(place_of(shard), path, tensor)

    receiver = nn.Parameter(torch.empty(0, dtype=matrices.dtype_of(path)), requires_grad=False)
    receiver.weight_loader = load  # type: ignore[attr-defined]
    return receiver
