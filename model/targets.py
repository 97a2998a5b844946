"""The matrices that a model multiplies by, and which of them have the same input: found by watching a forward.

Four tokens are run through the model with its layers on the meta device, where tensors have shapes but no values. Targets whose
input is the same tensor object form a group, whatever the architecture calls them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.streamed import Checkpoint
from ..compress.forms.base import linear_shape
from ..compress.forms.experts import channels_are_free, expert_parameters
from .lockstep import Lockstep, run_layer

TINY = 4  # tokens of the forward that finds the groups


@dataclass(frozen=True)
class Target:
    """One weight matrix to compress.

    Args:
        name: its module path; for an expert, the path of the fused parameter, a dot and the expert's number.
        module: path of the module that holds it.
        layer: number of its decoder layer.
        role: its path inside the layer, without an expert's number ('self_attn.q_proj').
        group: name of the first target that reads the same input; targets of one group share their statistics.
        out_features, in_features: its shape.
        bias: whether its module adds a bias.
        expert: the expert's number in a fused parameter, else None.
        bound: whether its input channels cannot be pruned together with the rows that compute them: a vector of the layer (a
            norm, not a bias of a matrix) has the same width, or an expert's gate pairs its channels in a way of its own.
        siblings: how many targets in the same module have its input, itself included; some of them may be kept dense.
    """

    name: str
    module: str
    layer: int
    role: str
    group: str
    out_features: int
    in_features: int
    bias: bool
    expert: int | None = None
    bound: bool = False
    siblings: int = 1

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


def watch(view: Checkpoint) -> list[Target]:
    """Run four tokens through the model with its layers on the meta device, and note which module multiplies which tensor."""
    layers = view.layers
    with torch.no_grad(), standing_in(view) as start, Lockstep(view.model, layers) as steps:
        steps.start([start])
        found: list[Target] = []
        while steps.index < len(layers):
            index = steps.index
            targets, output = _watch_layer(layers[index], index, view.layer_names[index], steps.calls[0])
            found += targets
            steps.answer([output])
    return found


@contextmanager
def standing_in(view: Checkpoint) -> Iterator[dict[str, Tensor]]:
    """While the context is open, weights outside the layers are zeros; gives the arguments of a forward that uses them."""
    model = view.model
    outside = [(m, n, p) for path, m in model.named_modules() if not path.startswith(view.layers_path + ".")
               for n, p in m.named_parameters(recurse=False)]  # fmt: skip
    embedding = model.get_input_embeddings()
    for module, name, parameter in outside:
        if module is not embedding and module is not model.get_output_embeddings():
            setattr(module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype), requires_grad=False))
    width = getattr(embedding, "embedding_dim", view.config.get_text_config().hidden_size)
    try:
        yield {"inputs_embeds": torch.zeros(1, TINY, width, dtype=view.dtype)}
    finally:
        for module, name, parameter in outside:
            setattr(module, name, parameter)
        view.tie()


def _watch_layer(layer: nn.Module, index: int, prefix: str, call: Any) -> tuple[list[Target], Any]:
    found: list[Target] = []
    readers: dict[int, str] = {}
    inputs: list[Tensor] = []  # kept alive, so that no two tensors share an id
    others = [module for module in layer.modules() if linear_shape(module) is None]
    widths = {p.numel() for module in others for p in module.parameters(recurse=False) if p.ndim == 1}

    def note(path: str, x: Tensor, shape: tuple[int, int], bias: bool) -> None:
        name = f"{prefix}.{path}"
        if any(target.name == name for target in found):
            return
        inputs.append(x)
        group = readers.setdefault(id(x), name)
        found.append(Target(name, name, index, path, group, *shape, bias, bound=shape[1] in widths))

    def hook(path: str, shape: tuple[int, int]) -> Any:
        return lambda module, args: note(path, args[0], shape, module.bias is not None)

    hooks = []
    for path, module in layer.named_modules():
        shape = linear_shape(module)
        if shape:
            hooks.append(module.register_forward_pre_hook(hook(path, shape)))
        elif expert_parameters(module):
            hooks.append(
                module.register_forward_pre_hook(lambda m, _, path=path: found.extend(_experts(m, path, prefix, index)))
            )
    try:
        output = run_layer(layer, call.to(torch.device("meta")))
    finally:
        for handle in hooks:
            handle.remove()
    zeros = torch.utils._pytree.tree_map(lambda x: torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x, output)
    paths = Counter(map(_place, found))
    return [replace(target, siblings=paths[_place(target)]) for target in found], zeros


def _place(target: Target) -> tuple[str, str]:
    """(Its group, the path of its module's parent in the layer)."""
    return target.group, target.role.rpartition(".")[0]


def _experts(module: nn.Module, path: str, prefix: str, layer: int) -> list[Target]:
    targets = []
    bound = not channels_are_free(module)
    for parameter, (experts, out_features, in_features) in expert_parameters(module).items():
        for expert in range(experts):
            name = f"{prefix}.{path}.{parameter}.{expert}"
            targets.append(
                Target(
                    name,
                    f"{prefix}.{path}",
                    layer,
                    f"{path}.{parameter}",
                    name,
                    out_features,
                    in_features,
                    False,
                    expert,
                    bound,
                )
            )
    return targets
