"""Which class of transformers a checkpoint's model has, and where its decoder layers are.

Of a multimodal checkpoint the whole model is built, since the result must open as the class that config.json names; its layers
are those of the text model inside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ModelError


def model_class(config: Any) -> Any:
    """The class to build and to open a model with: the one that config.json names, or one of transformers' auto classes.

    A class that is named is taken if it is a language model, with or without other modalities, and belongs to this type of
    configuration.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    causal, multimodal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    name = next(iter(config.architectures or ()), "")
    if name in causal.values() or name in multimodal.values():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and getattr(named, "config_class", None) is type(config):
            return named
    if config.model_type in multimodal and (config.model_type not in causal or config.get_text_config() is not config):
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def auto_class(model: Any) -> str:
    """Name of the class of transformers that opens a checkpoint as this model: an auto class where one does."""
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModelForMultimodalLM"):
        found = getattr(transformers, name)._model_mapping.get(type(model.config), None)
        if type(model) in (found if isinstance(found, tuple) else (found,)):
            return name
    return type(model).__name__ if hasattr(transformers, type(model).__name__) else "AutoModelForCausalLM"


def built(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A model of `model_class`, as transformers initialises it."""
    kind: Any = model_class(config)
    if hasattr(kind, "_from_config"):
        return kind._from_config(config, dtype=dtype)
    return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def keep_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the tensors that transformers holds in float32 whatever the model's dtype (a router's correction) that dtype."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)  # type: ignore[operator]
    if not plan:
        return
    pattern, by_group, _ = build_glob_alternation(list(plan))
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                found = None if tensor is None else pattern.search(f"{path}.{name}" if path else name)
                if found is not None and tensor is not None and tensor.is_floating_point():
                    held = tensor.to(plan[by_group[str(found.lastgroup)]])
                    tensors[name] = nn.Parameter(held, requires_grad=False) if isinstance(tensor, nn.Parameter) else held


def require_sizes(config: Any, name: str) -> None:
    """Refuse a model whose configuration does not say what every plan is computed from.

    Raises:
        ModelError: it names no width of the hidden state, no vocabulary or no number of layers.
    """
    text = config.get_text_config()
    needed = ("hidden_size", "vocab_size", "num_hidden_layers")
    lacking = [key for key in needed if not isinstance(getattr(text, key, None), int)]
    if lacking:
        raise ModelError(
            f"{name}: the configuration of type '{text.model_type}' has no {' and no '.join(lacking)} of one text decoder.",
            "lrc compresses one stack of decoder layers over one vocabulary.",
        )


def text_decoder(model: Any) -> Any:
    """The module inside a model that computes the last hidden state of text: the model without its head."""
    decoder = model.get_decoder()
    if not hasattr(decoder, "get_output_embeddings") or decoder.get_output_embeddings() is None:
        return decoder
    path, _ = find_layers(model, type(model).__name__)  # the decoder has a head of its own (Llama 4)
    return model.get_submodule(path.rpartition(".")[0])


def without_head(model: Any) -> Any:
    """The part of a model that gives hidden states and no logits."""
    return text_decoder(model) if model.base_model is model else model.base_model


def find_layers(model: Any, name: str) -> tuple[str, list[nn.Module]]:
    """Path and modules of the decoder layers: the module list of the text model with most of the parameters.

    The text model of a multimodal model is the one that is built from the text part of the configuration. Lists with as many
    modules as that has layers go first.

    Raises:
        ModelError: the model has no module list.
    """
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [item for item in lists if _reads_text(model, item[0])] or lists
    if not lists:
        raise ModelError(f"{name}: the model has no list of layers.", "lrc compresses stacks of decoder layers.")
    count = getattr(getattr(model, "config", None) and model.config.get_text_config(), "num_hidden_layers", None)
    fitting = [item for item in lists if len(item[1]) == count] or lists
    path, layers = max(fitting, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return path, list(layers)


def _reads_text(model: Any, path: str) -> bool:
    """Whether the module at this path is in the text model: no part of the configuration but the text's made it."""
    text, inner = {id(model.config), id(model.config.get_text_config())}, model
    for part in path.split("."):
        inner = getattr(inner, part)
        config = getattr(inner, "config", None)
        if hasattr(inner, "get_decoder") and id(config) not in text and config != model.config.get_text_config():
            return False
    return True
