"""Counts in a configuration against what the weight files hold, before transformers builds as many modules.

transformers builds one module per layer, and lists with an entry per layer already in the configuration, before anybody looks
at a weight: a forged number of layers costs minutes and gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import ModelError, brief
from .json_text import dotted, walked

# A model of so many layers, experts or classes is built in about a second. Parts that a checkpoint was stripped of (a vision
# tower) may therefore keep their counts.
FREE = 1024
_LAYERS = re.compile(
    r"((.*_)?(n|num)_([a-z0-9]+_)*|encoder_|decoder_|vision_)?(layers?|depths?|blocks?|block_count)|(.*\.)?block_count"
)
_OTHERS = re.compile(r"num_labels|(.*_)?(n|num)(_[a-z]+)*_experts|(.*\.)?expert_count")


def has_large_count(values: Mapping[str, Any]) -> bool:
    """Whether there is a count that `require_counts` would compare with the weight files."""
    return next(_large_counts(values), None) is not None


def require_counts(values: Mapping[str, Any], tensors: int, experts: int, where: str) -> None:
    """Refuse more layers than the weight files hold tensors, and more experts or classes than they can have.

    Args:
        values: a configuration as JSON, or the settings in the header of a GGUF file.
        tensors: tensors in the weight files.
        experts: the longest first axis of their tensors of three axes (fused experts).
        where: the file, for the message.

    Raises:
        ModelError: a count is too large.
    """
    for path, value, layers in _large_counts(values):
        if value > (tensors if layers else max(tensors, experts)):
            raise ModelError(
                f"{where}: '{dotted(path)}' is {brief(str(value), 40)}, and the weight files hold {tensors:,} tensors.",
                "It is damaged, or does not belong to these weights: get it again.",
            )


def _large_counts(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], float, bool]]:
    """(Path, value, whether it counts layers) of every count above `FREE`."""
    for path, value in walked(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= FREE:
            continue
        key = next((part for part in reversed(path) if isinstance(part, str)), "")
        layers = _LAYERS.fullmatch(key) is not None
        if layers or _OTHERS.fullmatch(key):
            yield path, value, layers
