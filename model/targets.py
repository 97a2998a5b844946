"""The matrices that a model multiplies by, and which of them have the same input: found by watching a forward.

Four tokens are run through the model with its layers on the meta device, where tensors have shapes but no values. Targets whose
input is the same tensor object form a group, whatever the architecture calls them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from greenlet import GreenletExit
from torch import Tensor, nn

from ..checkpoint.streamed import Checkpoint
from ..checkpoint.untrusted.foreign import foreign
from ..compress.forms.base import linear_shape
from ..compress.forms.experts import channels_are_free, expert_parameters
from ..errors import ModelError
from .lockstep import Lockstep, replaced, run_without_weights

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
    """Run four tokens through the model with its layers on the meta device, and note which module multiplies which tensor.

    Raises:
        ModelError: the model's forward does not go through its layers one after the other.
    """
    layers, found = view.layers, list[Target]()
    with torch.no_grad(), standing_in(view) as start, Lockstep(view.model, layers) as steps, _explained(view):
        before = _versions(layers)
        steps.start([start])
        if _versions(layers) != before:
            raise ModelError(
                f"{view.location.name}: the forward of {type(view.model).__name__} changes the weights of its layers.",
                "This architecture cannot be compressed: stored weights would change too.",
            )
        for index in range(len(layers)):
            _require_turn(view, steps, index)
            targets, output = _watch_layer(layers[index], index, view.layer_names[index], steps.calls[0])
            found += targets
            with nullcontext() if index == len(layers) - 1 else _nothing_outside(view, index):
                steps.answer([output])
        if not steps.ended:
            _require_turn(view, steps, len(layers))
    return found


def _versions(layers: Sequence[nn.Module]) -> list[int]:
    """How often each weight of the layers was changed in place."""
    return [parameter._version for layer in layers for parameter in layer.parameters()]


def _require_turn(view: Checkpoint, steps: Lockstep, index: int) -> None:
    """Refuse a model that does not call this layer now; `index` is the number of layers where its forward should end."""
    if steps.ended or steps.index != index:
        count = len(view.layers)
        then = "ends" if steps.ended else f"calls layer {steps.index}"
        raise ModelError(
            f"{view.location.name}: {type(view.model).__name__} has {count} layers in {view.layers_path}, and its forward "
            f"{then} after {index} calls: lrc needs each of them called once, in order.",
            "This architecture cannot be compressed layer by layer.",
        )
    if not steps.ended and steps.calls[0].hidden.is_meta:
        raise _used_between(view, index - 1)


def _used_between(view: Checkpoint, index: int) -> ModelError:
    return ModelError(
        f"{view.location.name}: after layer {index}, {type(view.model).__name__} computes with weights outside "
        f"{view.layers_path} before it calls layer {index + 1}, or does not call that layer on text alone.",
        "This architecture cannot be compressed layer by layer.",
    )


@contextmanager
def _nothing_outside(view: Checkpoint, index: int) -> Iterator[None]:
    """While the context is open, weights outside the layers are on the meta device, as they are during the layers of a run.

    Args:
        index: the layer that is answered meanwhile.
    """
    outside = [module for path, module in view.model.named_modules() if not path.startswith(view.layers_path + ".")]
    try:
        with replaced(outside, lambda tensor: tensor.to("meta") if isinstance(tensor, nn.Parameter) else tensor):
            yield
    except RuntimeError as error:  # torch's, about two devices
        raise _used_between(view, index) from error


def _explained(view: Checkpoint) -> AbstractContextManager[None]:
    """Turn an error inside the model's own code, which text alone or shapes alone do not satisfy, into a refusal."""
    return foreign(
        ModelError,
        f"{view.location.name}: {type(view.model).__name__} does not run on text alone, layer by layer",
        "A setting in config.json is damaged, or this architecture cannot be compressed layer by layer.",
    )


@contextmanager
def standing_in(view: Checkpoint, through_head: bool = False) -> Iterator[dict[str, Tensor]]:
    """While the context is open, weights outside the layers are zeros; gives the arguments of a forward that uses them.

    The zeros take no memory: one number stands for a whole tensor. The forward ends where the output head is called, unless it
    is to go through it.
    """
    model = view.model
    outside = [(m, n, p) for path, m in model.named_modules() if not path.startswith(view.layers_path + ".")
               for n, p in m.named_parameters(recurse=False)]  # fmt: skip
    head = model.get_output_embeddings()
    for module, name, parameter in outside:
        zeros = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
        setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    stopped = head is not None and not through_head
    if stopped:
        head.forward = _ending
    try:
        yield {"input_ids": torch.full((1, TINY), plain_token(view.config))}
    finally:
        if stopped:
            del head.forward
        for module, name, parameter in outside:
            setattr(module, name, parameter)
        view.tie()


def _ending(*_: Any, **__: Any) -> Any:
    raise GreenletExit  # ends the forward's greenlet without an error


def plain_token(config: Any) -> int:
    """The first token that is none of the special ones of a model's configuration (padding, the place of an image)."""
    special: set[Any] = set()
    for each in (config, config.get_text_config()):
        for name, value in vars(each).items():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                special.update(value if isinstance(value, list | tuple) else [value])
    return next(token for token in range(len(special) + 1) if token not in special)


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

    def forget() -> None:
        found.clear()
        readers.clear()

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
        output = run_without_weights(layer, call, forget)
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
