"""The entries of a configuration: cutting what has one entry per layer, and changing single ones.

A configuration may hold others (that of the text model, of attention) and dictionaries; an entry is named by the keys that lead
to it.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Path = tuple[str, ...]  # keys that lead to an entry of a configuration
Edits = Mapping[Path, Any]


def shallower(config: Any, layers: Sequence[int], edits: Edits | None = None) -> Any:
    """A copy of a configuration with fewer layers; everything that has one entry per layer is cut.

    Args:
        config: a transformers configuration.
        layers: numbers of the original layers that are kept, ascending.
        edits: entries that are given another value.
    """
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    before = text.num_hidden_layers
    if len(layers) == before:
        return cut
    for path, value in list(entries(text)):
        if isinstance(value, list | tuple) and len(value) == before:
            _put(text, path, type(value)(value[layer] for layer in layers))
        elif isinstance(value, dict) and value and all(_is_layer(key, before) for key in value):
            moved = {int(key): each for key, each in value.items()}
            whole = type(next(iter(value)))
            _put(text, path, {whole(new): moved[old] for new, old in enumerate(layers) if old in moved})
    text.num_hidden_layers = len(layers)
    for path, value in (edits or {}).items():
        _put(text, path, value)
    return cut


def _is_layer(key: Any, layers: int) -> bool:
    return str(key).isdigit() and int(key) < layers


def entries(config: Any) -> Iterator[tuple[Path, Any]]:
    """(path, value) of the entries of a configuration, and of the configurations and dictionaries in it."""
    held = config if isinstance(config, dict) else vars(config)
    for key, value in list(held.items()):
        if not isinstance(key, str) or key.startswith("_"):
            continue
        yield (key,), value
        if isinstance(value, dict) or hasattr(value, "to_dict"):
            yield from (((key, *path), each) for path, each in entries(value))


def entry(config: Any, path: Path) -> Any:
    for key in path:
        # as it is held: a configuration may refuse to give a setting that its layers can have each for themselves (Gemma 4)
        held = config if isinstance(config, dict) else vars(config)
        config = held[key] if key in held else getattr(config, key)
    return config


def _put(config: Any, path: Path, value: Any) -> None:
    holder = entry(config, path[:-1])
    if isinstance(holder, dict):
        holder[path[-1]] = value
    else:
        setattr(holder, path[-1], value)


def may_number(value: Any, layers: int) -> bool:
    """Whether a value could be a number of layers, or a list of layers' numbers."""
    if isinstance(value, list | tuple):
        return all(type(each) is int and 0 <= each < layers for each in value) and len(set(value)) == len(value)
    return type(value) is int and 0 <= value <= layers


def may_be_list(config: Any, path: Path) -> bool:
    """Whether an entry that is None could be a list of numbers, by the annotation of the configuration's class."""
    holder = entry(config, path[:-1])
    if isinstance(holder, dict) or entry(config, path) is not None:
        return False
    return any("list[int]" in str(inspect.get_annotations(kind).get(path[-1], "")) for kind in type(holder).__mro__)


def written(config: Any) -> Any:
    """The configuration as transformers will read it from the result's config.json."""
    entries = type(config)._decode_special_floats(json.loads(config.to_json_string()))
    read = type(config).from_dict(entries)
    read._name_or_path = config._name_or_path
    return read
