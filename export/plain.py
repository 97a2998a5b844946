"""Results that can be loaded without lrc.

If all feed-forwards keep equally many channels and nothing else is compressed, the tensors are those of the same architecture
with a smaller inner width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.hf_quantizer import WITHOUT_LRC
from ..compress.forms.base import Dense
from ..compress.forms.pruned import Pruned

Shapes = dict[str, tuple[int, ...]]


def as_plain(config: Mapping[str, Any], kind: type[Any], architecture: type[nn.Module]) -> dict[str, Any]:
    """config.json without lrc's forms, if the tensors fit the same architecture with another inner width; else unchanged.

    The entry of the inner width is found by trial: every entry with the value of the inner width is changed, until a model with
    the tensors' shapes results.

    Args:
        config: the content of config.json; `quantization_config` names the forms.
        kind: the class of the model's configuration.
        architecture: the class of the model.
    """
    forms: dict[str, dict[str, Any]] = config.get("quantization_config", {}).get("modules", {})
    if not forms or any(spec["kind"] != Pruned.kind or spec["form"]["kind"] != Dense.kind for spec in forms.values()):
        return dict(config)
    plain = {key: value for key, value in config.items() if key != "quantization_config" and key not in WITHOUT_LRC}
    whole = _built(plain, kind, architecture)
    modules = {path: module for path in forms if type(module := whole.get_submodule(path)) is nn.Linear}
    if len(modules) < len(forms):
        return dict(config)  # modules other than nn.Linear may store the transposed weight
    widths = {(modules[path].in_features, spec["columns"]) for path, spec in forms.items()}
    narrow = [(inner, channels) for inner, channels in widths if channels < inner]
    if len(narrow) != 1:
        return dict(config)
    (inner, channels), wanted = narrow[0], _shapes(whole)
    for path, spec in forms.items():
        wanted[f"{path}.weight"] = (spec["rows"], spec["columns"])
        if spec["form"]["bias"]:
            wanted[f"{path}.bias"] = (spec["rows"],)
    for part, key in _entries(plain, inner):
        tried = copy.deepcopy(plain)
        (tried if part is None else tried[part])[key] = channels
        try:
            found = _shapes(_built(tried, kind, architecture))
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
            continue  # another entry with the same value, for which this one is invalid
        if found == wanted:
            return tried
    return dict(config)


def _entries(config: Mapping[str, Any], value: int) -> list[tuple[str | None, str]]:
    """(nested configuration or None, key) of every entry with this value, in a configuration and in those nested in it."""
    found: list[tuple[str | None, str]] = [(None, key) for key, held in config.items() if held == value]
    parts = [(part, held) for part, held in config.items() if isinstance(held, dict)]
    return found + [(part, key) for part, entries in parts for key, held in entries.items() if held == value]


def _built(config: Mapping[str, Any], kind: type[Any], architecture: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return architecture(kind.from_dict(dict(config)))


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
