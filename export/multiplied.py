"""Forms multiplied out: the tensors of the original architecture, with every matrix dense.

Channels that were pruned come back as zeros where the layers keep different numbers of them, because the original architecture
has one inner width. The width is then the largest that a layer keeps. Zero rows and columns change no output.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.forms import stream_map
from ..compress.forms.base import Dense, Spec, bias_of, is_form_module, matrix_of
from ..compress.forms.experts import FORMS, expert_parameters
from ..compress.forms.pruned import Pruned
from ..model.layerwise import in_memory
from .base import Carried
from .plain import as_plain
from .source import Source


class Multiplied:
    """The plain model of a result.

    Args:
        source: the result.
        name: of the export format, for messages.

    Attributes:
        config: the content of config.json.
        model: the plain model on the meta device.

    Raises:
        RequestError: the original architecture has no place for a module of the result.
    """

    def __init__(self, source: Source, name: str) -> None:
        self.source = source
        _require_a_place(source, name)
        self.config = narrowed(source)
        self.model = source.built(self.config)
        self.state: dict[str, Tensor] = self.model.state_dict()

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors, tied ones counted once."""
        return self.source.nbytes(self.state, dtype)

    def parts(
        self, dtype: torch.dtype, apart: Collection[str] = (), encode: Callable[[str], dict[str, Tensor]] = lambda path: {}
    ) -> Iterator[dict[str, Tensor]]:
        """The tensors by their names in the model, one layer at a time and then those outside the layers.

        Args:
            dtype: of floating-point tensors.
            apart: paths of modules that are not multiplied out.
            encode: path of such a module, whose weights are in memory -> its tensors by their names in the export.
        """
        view, tied = self.source.view, self.source.view.tied
        for name in view.layer_names:
            inside = [path for path in apart if path.startswith(name + ".")]
            with in_memory(view, name) as layer:
                part = {}
                for path, tensor in tensors_of(layer, {each.removeprefix(name + ".") for each in inside}):
                    if f"{name}.{path}" not in tied:
                        part[f"{name}.{path}"] = self._placed(f"{name}.{path}", tensor, dtype)
                for path in inside:
                    part |= encode(path)
                yield part
        for part in self.source.outside():
            yield {path: self._placed(path, tensor, dtype) for path, tensor in part.items()}

    def _placed(self, path: str, held: Tensor | list[Tensor], dtype: torch.dtype) -> Tensor:
        """A tensor, or one matrix per expert, as the plain model stores it: transposed where it does so, and padded."""
        wanted = self.state[path].shape
        owner, _, last = path.rpartition(".")
        module = self.model.get_submodule(owner)
        if isinstance(held, list):
            _, rows, columns = expert_parameters(module)[last]
            stacked = torch.stack([_padded(matrix, (rows, columns), _is_fused(module, rows)) for matrix in held])
            tensor = stacked.transpose(1, 2) if module.is_transposed else stacked
        elif owner in self.source.specs:
            parent = self.model.get_submodule(owner.rpartition(".")[0])
            tensor = held.T if last == "weight" and type(module).__name__ == "Conv1D" else held
            tensor = _padded(tensor, tuple(wanted), _is_fused(parent, wanted[0]))
        else:
            tensor = held
        return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def tensors_of(layer: nn.Module, skip: Collection[str] = ()) -> Iterator[tuple[str, Tensor | list[Tensor]]]:
    """Path in the layer -> tensor, with every form multiplied out in float32 as (out, in); of experts, one matrix each.

    Args:
        layer: with its weights in memory.
        skip: paths of modules that are left out.
    """
    inner = ""
    for path, module in layer.named_modules():
        if inner and path.startswith(inner):
            continue
        inside = f"{path}." if path else ""
        if is_form_module(module) or (path.endswith(FORMS) and isinstance(module, nn.ModuleList)):
            inner = inside  # named_modules goes down first: what follows until another path belongs to this module
        if path in skip:
            continue
        if is_form_module(module):
            yield f"{inside}weight", matrix_of(module, torch.float32)
            if (bias := bias_of(module)) is not None:
                yield f"{inside}bias", bias.detach()
        if inner == inside and inside:
            continue
        fused = {name.removesuffix(FORMS): forms for name, forms in module.named_children() if name.endswith(FORMS)}
        for name, tensor in _own(module):
            if isinstance(forms := fused.get(name), nn.ModuleList):
                yield f"{inside}{name}", [matrix_of(form, torch.float32) for form in forms]
            else:
                yield f"{inside}{name}", tensor.detach()


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _require_a_place(source: Source, name: str) -> None:
    carried, plain = Carried(), source.plain_model
    for path, spec in source.specs.items():
        if spec["kind"] == stream_map.KIND:
            carried.refused[path] = "a repair maps the hidden state, and the original architecture has no matrix there"
        elif has_bias(spec) and getattr(plain.get_submodule(path), "bias", None) is None:
            carried.refused[path] = "the method added a bias, and the original architecture has none there"
    carried.require(name, "The format 'self-contained' carries every result.")


def has_bias(spec: Spec) -> bool:
    """Whether a form of this spec stores a bias."""
    if spec["kind"] == "experts":
        return False
    inner = spec.get("form") if spec["kind"] == Pruned.kind else spec.get("left") if spec["kind"] == "product" else None
    return has_bias(inner) if inner is not None else bool(spec.get("bias"))


def narrowed(source: Source) -> dict[str, Any]:
    """The plain configuration, with the largest inner width that a layer keeps where every layer has lost channels."""
    config, specs = source.plain_config(), source.specs
    pruned = {path: spec for path, spec in specs.items() if spec["kind"] == Pruned.kind}
    if not pruned:
        return config
    plain = source.plain_model
    modules = {path: plain.get_submodule(path) for path in pruned}
    widths = {path: spec["columns"] for path, spec in pruned.items() if spec["columns"] < _inputs(modules[path])}
    if not widths or any(type(module) is not nn.Linear for module in modules.values()):
        return config
    width, uniform = max(widths.values()), {}
    for path, spec in pruned.items():
        form = {"kind": Dense.kind, "bias": has_bias(spec)}
        fused = _is_fused(plain.get_submodule(path.rpartition(".")[0]), modules[path].out_features)
        rows, columns = (2 * width if fused else width, spec["columns"])
        uniform[path] = spec | {"form": form} | ({"columns": width} if path in widths else {"rows": rows, "columns": columns})
    found = as_plain(config | {"quantization_config": {"modules": uniform}}, type(source.view.config), type(source.view.model))
    return config if "quantization_config" in found else found


def _inputs(module: Any) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0])


def _padded(tensor: Tensor, shape: tuple[int, ...], fused: bool) -> Tensor:
    """A matrix or a bias with zeros in place of what was pruned: at the end, and of fused gate and up at the end of each."""
    if tuple(tensor.shape) == shape:
        return tensor
    if fused:
        half = (shape[0] // 2, *shape[1:])
        return torch.cat([_padded(part, half, False) for part in tensor.chunk(2)])
    whole = tensor.new_zeros(shape)
    whole[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return whole


def _is_fused(parent: nn.Module, rows: int) -> bool:
    """Whether a matrix with this many rows in a feed-forward is gate and up in one: another one reads half as many."""
    if experts := expert_parameters(parent):
        return any(2 * columns == rows for _, _, columns in experts.values())
    return any(2 * module.in_features == rows for module in parent.children() if isinstance(module, nn.Linear))
