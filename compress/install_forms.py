"""Replacing the modules of a model by those of a compressed checkpoint's forms.

export/self_contained.py copies this file and forms/ beside the weights, so they import nothing else but the errors and the
registry.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from ..errors import CheckpointError, ModelError, brief, problem
from .forms.base import MODULES, Spec, bias_of, build_module, linear_shape, matrix_of
from .forms.experts import FORMS, IMPLEMENTATION, expert_parameters, register
from .forms.experts import install as install_experts
from .forms.shared import link
from .forms.stream_map import KIND as MAP
from .forms.stream_map import StreamMap
from .forms.stream_map import install as install_map


def install_forms(model: Any, modules: dict[str, Spec], dtype: torch.dtype | None) -> None:
    """Replace the named modules of a model on the meta device by empty modules of their forms.

    Args:
        modules: module path -> the spec of its form; a fused experts parameter has `{"kind": "experts", "forms": [...]}`.
        dtype: of the floating-point tensors; None: torch's default.

    Raises:
        CheckpointError: they do not fit the model.
    """
    for name, spec in modules.items():
        parent_name, _, leaf = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            with torch.device("meta"):
                if spec["kind"] == "experts":
                    count, out_features, in_features = expert_parameters(parent)[leaf]
                    forms = [build_module(form, in_features, out_features, dtype) for form in _forms_of(spec, count)]
                elif spec["kind"] == MAP:
                    install_map(model.get_submodule(name), spec, dtype)
                else:
                    shape = linear_shape(getattr(parent, leaf))
                    if shape is None:
                        raise AttributeError(f"'{name}' is no linear module")
                    module: Any = build_module(spec, shape[1], shape[0], dtype)
                    module.replaced = (*shape, type(getattr(parent, leaf)))
                    setattr(parent, leaf, module)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"The checkpoint's quantization_config does not fit this model: '{brief(name)}' as "
                f"{brief(repr(spec.get('kind')))}: {_reason(error)}. "
                f"Forms known here: experts, {MAP}, {', '.join(MODULES)}.",
                "Its config.json was changed, or it was written by a newer lrc.",
            ) from error
        if spec["kind"] == "experts":
            install_experts(parent, leaf, forms)
    link(modules, model.get_submodule)
    if any(spec["kind"] == "experts" for spec in modules.values()):
        register()
        model.set_experts_implementation(IMPLEMENTATION)


def _forms_of(spec: Spec, count: int) -> list[Spec]:
    """The specs of a fused parameter's experts."""
    forms = spec["forms"]
    if not isinstance(forms, list) or len(forms) != count or spec.keys() != {"kind", "forms"}:
        raise ValueError(f"it needs a list of {count} forms and nothing else")
    return forms


def _reason(error: Exception) -> str:
    """Why a spec does not fit, on one line."""
    if isinstance(error, ValidationError):
        return problem(error)
    return brief(str(error))


def multiply_out(model: Any, dtype: torch.dtype) -> None:
    """Replace the modules of forms by the modules that they stand for, with dense weights.

    Args:
        model: with its weights in memory.
        dtype: of the weights.

    Raises:
        ModelError: the original architecture has no place for a form: fewer channels, or a map of the hidden state.
    """
    found = [(path, module) for path, module in model.named_modules() if hasattr(module, "replaced")]
    odd = [path for path, module in model.named_modules() if isinstance(module, StreamMap)]
    odd += [path for path, module in found if _shape(module) != module.replaced[:2]]
    if odd:
        raise ModelError(
            f"{len(odd)} modules of this model have no dense form in its architecture, '{odd[0]}' first.",
            "`lrc export --to dense` writes a model with another width; `--to self-contained` carries every form.",
        )
    for path, module in found:
        rows, columns, kind = module.replaced
        weight, bias = matrix_of(module, torch.float32).to(dtype), bias_of(module)
        dense: Any = kind(rows, columns) if kind.__name__ == "Conv1D" else kind(columns, rows, bias is not None)
        dense.weight = nn.Parameter(weight.T.contiguous() if kind.__name__ == "Conv1D" else weight, requires_grad=False)
        dense.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense.train(module.training))
    for module in list(model.modules()):
        for name, forms in list(module.named_children()):
            if isinstance(forms, nn.ModuleList) and name.endswith(FORMS):
                stacked = torch.stack([matrix_of(form, torch.float32).to(dtype) for form in forms])
                whole = stacked.transpose(1, 2).contiguous() if module.is_transposed else stacked
                delattr(module, name)
                setattr(module, name.removesuffix(FORMS), nn.Parameter(whole, requires_grad=False))


def _shape(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features
