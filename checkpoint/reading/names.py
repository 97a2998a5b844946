"""Names of tensors in a checkpoint and in the model that transformers builds of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .weights import WeightSource


def renamed_tensors(model: Any, source: WeightSource) -> tuple[dict[str, str], list[str]]:
    """Name in the checkpoint -> name in the model, and the checkpoint's names that the model does not have."""
    from transformers.core_model_loading import rename_source_key

    known = model.state_dict()
    if source.names() and all(name in known for name in source.names()):
        return {name: name for name in source.names()}, []
    renamings, converters = _conversions(model)
    renamed, unused = {}, []
    for name in source.names():
        new, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if new not in known and name in known:
            new = name
        if new in known:
            renamed[name] = new
        else:
            unused.append(name)
    return renamed, unused


def all_made(model: Any, renamed: dict[str, str]) -> dict[str, list[str]]:
    """Name in the checkpoint -> every name in the model that transformers makes of it: it splits some tensors."""
    splits = [entry.target_patterns for entry in _conversions(model)[1] if len(entry.target_patterns) > 1]
    made = {name: [target] for name, target in renamed.items()}
    for name, (target, *_) in made.items():
        for first, *others in splits:
            if name != target and first in target:
                made[name] += [target.replace(first, other) for other in others]
    return made


def reshaped(model: Any) -> Callable[[str], bool]:
    """A function that says of a tensor of the checkpoint whether transformers fuses, splits or transposes it on loading."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _conversions(model)
    return lambda name: rename_source_key(name, renamings, converters)[1] is not None


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """What transformers does to tensors when it loads this model: renamings, and conversions."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping: list[Any] = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]
