"""Names of tensors in a checkpoint and in the model that transformers builds of it."""

from __future__ import annotations

from typing import Any

from .weights import WeightSource


def renamed_tensors(model: Any, source: WeightSource) -> tuple[dict[str, str], list[str]]:
    """Name in the checkpoint -> name in the model, and the checkpoint's names that the model does not have."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known = model.state_dict()
    if source.names() and all(name in known for name in source.names()):
        return {name: name for name in source.names()}, []
    mapping = get_model_conversion_mapping(model)
    converters: list[Any] = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings: list[Any] = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
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
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    splits = [entry.target_patterns for entry in get_model_conversion_mapping(model)
              if isinstance(entry, WeightConverter) and len(entry.target_patterns) > 1]  # fmt: skip
    made = {name: [target] for name, target in renamed.items()}
    for name, (target, *_) in made.items():
        for first, *others in splits:
            if name != target and first in target:
                made[name] += [target.replace(first, other) for other in others]
    return made


def changes_shape(model: Any, name: str) -> bool:
    """Whether transformers fuses, splits or transposes this tensor of the checkpoint when it loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters: list[Any] = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings: list[Any] = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    return rename_source_key(name, renamings, converters)[1] is not None
