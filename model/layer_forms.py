"""A layer's targets and their forms: reading weights from modules, the tensors to store, installing forms in the layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.forms import experts
from ..compress.forms.base import Form, Spec, build_module, fill_module, linear_weight
from ..compress.forms.shared import link
from .targets import Target


def target_weight(layer: nn.Module, name: str, target: Target) -> tuple[Tensor, Tensor | None]:
    """A target's weight (out, in) and bias (out,) or None; views."""
    module: Any = layer.get_submodule(target.module.removeprefix(name + "."))
    if target.expert is None:
        return linear_weight(module), module.bias
    return experts.expert_weight(module, target.role.rpartition(".")[2], target.expert), None


def stored_tensors(layer: nn.Module, name: str, forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """The layer's tensors as they are stored: those of a form in place of the weight of every target that has one."""
    tensors: dict[str, Tensor] = {}
    fused = {key.rpartition(".")[0] for key in forms}
    for path, tensor in layer.state_dict().items():
        full = f"{name}.{path}"
        module, _, leaf = full.rpartition(".")
        if full in fused:  # an experts parameter: an empty guard under its name, every expert's form beside it
            parent = layer.get_submodule(path.rpartition(".")[0]) if "." in path else layer
            tensors[full] = tensor.new_empty(0)
            for expert in range(len(tensor)):
                form = forms.get(f"{full}.{expert}")
                parts = form.tensors() if form else {"weight": experts.expert_weight(parent, leaf, expert).contiguous()}
                tensors |= {f"{module}.{experts.stored_name(leaf, expert)}.{suffix}": part for suffix, part in parts.items()}
        elif module not in forms:
            tensors[full] = tensor.to("cpu")
        elif leaf == "weight":
            tensors |= {f"{module}.{suffix}": part for suffix, part in forms[module].tensors().items()}
    return tensors


def form_specs(targets: Iterable[Target], forms: Mapping[str, Form]) -> dict[str, Spec]:
    """Module path -> spec, as config.json will carry it; the experts of one parameter together."""
    specs: dict[str, Spec] = {}
    for target in targets:
        form = forms.get(target.name)
        if target.expert is not None:
            parameter = target.name.rpartition(".")[0]
            entry = specs.setdefault(parameter, {"kind": "experts", "forms": []})
            entry["forms"].append(form.spec() if form else {"kind": "dense", "bias": False})
        elif form:
            specs[target.name] = form.spec()
    return {
        name: spec
        for name, spec in specs.items()
        if spec["kind"] != "experts" or any(f["kind"] != "dense" for f in spec["forms"])
    }


def install(layer: nn.Module, name: str, specs: Mapping[str, Spec], tensors: Mapping[str, Tensor]) -> None:
    """Install the stored forms in the layer, so that the compressed layer can be run."""

    def module_for(spec: Spec, path: str, shape: tuple[int, int], device: torch.device) -> nn.Module:
        prefix = path + "."
        parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        with torch.device("meta"):
            empty = build_module(spec, shape[1], shape[0])
        return fill_module(empty, parts).to(device)

    for full, spec in specs.items():
        path = full.removeprefix(name + ".")
        parent_path, _, leaf = path.rpartition(".")
        parent = layer.get_submodule(parent_path) if parent_path else layer
        if spec["kind"] == "experts":
            shape, device = experts.expert_parameters(parent)[leaf][1:], getattr(parent, leaf).device
            modules = [
                module_for(form, f"{full.rpartition('.')[0]}.{experts.stored_name(leaf, expert)}", shape, device)
                for expert, form in enumerate(spec["forms"])
            ]
            experts.install(parent, leaf, modules)
        else:
            weight = linear_weight(getattr(parent, leaf))
            setattr(parent, leaf, module_for(spec, full, (weight.shape[0], weight.shape[1]), weight.device))
    link(specs, lambda path: layer.get_submodule(path.removeprefix(name + ".")))
