"""Replacing the modules of a model by those of a compressed checkpoint's forms.

export/self_contained.py copies this file and forms/ beside the weights, so they import nothing else but the errors and the
registry.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CheckpointError
from .forms.base import MODULES, Spec, build_module, linear_shape
from .forms.experts import IMPLEMENTATION, expert_parameters, register
from .forms.experts import install as install_experts
from .forms.shared import link
from .forms.stream_map import KIND as MAP
from .forms.stream_map import install as install_map


def install_forms(model: Any, modules: dict[str, Spec], dtype: torch.dtype | None) -> None:
    """Replace the named modules of a model on the meta device by empty modules of their forms.

    Args:
        modules: module path -> the spec of its form; a fused experts parameter has `{"kind": "experts", "forms": [...]}`.
        dtype: of the floating-point tensors; None: torch's default.

    Raises:
        CheckpointError: they do not fit the model.
    """
    if not isinstance(modules, dict) or not all(isinstance(spec, dict) for spec in modules.values()):
        raise CheckpointError(
            "The checkpoint's quantization_config has no readable 'modules'.", "Its config.json was changed; get it again."
        )
    for name, spec in modules.items():
        parent_name, _, leaf = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            with torch.device("meta"):
                if spec["kind"] == "experts":
                    _, out_features, in_features = expert_parameters(parent)[leaf]
                    forms = [build_module(form, in_features, out_features, dtype) for form in spec["forms"]]
                elif spec["kind"] == MAP:
                    install_map(model.get_submodule(name), spec, dtype)
                else:
                    shape = linear_shape(getattr(parent, leaf))
                    if shape is None:
                        raise AttributeError(f"'{name}' is no linear module")
                    setattr(parent, leaf, build_module(spec, shape[1], shape[0], dtype))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint's quantization_config does not fit this model: '{name}' as {spec.get('kind')!r}: {error}. "
                f"Forms known here: experts, {MAP}, {', '.join(MODULES)}.",
                "Its config.json was changed, or it was written by a newer lrc.",
            ) from error
        if spec["kind"] == "experts":
            install_experts(parent, leaf, forms)
    link(modules, model.get_submodule)
    if any(spec["kind"] == "experts" for spec in modules.values()):
        register()
        model.set_experts_implementation(IMPLEMENTATION)
