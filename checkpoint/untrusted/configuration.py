"""config.json before transformers reads it, and what it made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import ModelError, brief
from .counts import has_large_count, require_counts
from .files import CONFIG, SETTINGS, size_of
from .foreign import foreign
from .json_text import json_object
from .weights_header import count_tensors

_LEAST = {"vocab_size": 1, "num_hidden_layers": 0, "max_position_embeddings": -1}  # -1: an old way to say "any number"
_BESIDE = ("generation_config.json", "tokenizer_config.json")


def require_sound_config(path: Path) -> None:
    """Read config.json within bounds, and compare its counts of layers and experts with the weight files beside it.

    The small files beside it that transformers reads, and that lrc copies into the result, must be JSON objects too.

    Raises:
        ModelError: it is no sound JSON object, or a count is larger than the weight files allow.
    """
    config = json_object(path, CONFIG, ModelError, finite=True)
    if has_large_count(config):  # only then are the headers of the weight files read for it
        tensors, experts = count_tensors(path.parent)
        require_counts(config, tensors, experts, brief(str(path)))
    for name in _BESIDE:
        if size_of(path.parent / name, ModelError) is not None:
            json_object(path.parent / name, SETTINGS, ModelError)


def require_usable_text(config: Any, name: str) -> None:
    """Check the few numbers of a configuration that lrc itself calculates with.

    Raises:
        ModelError: transformers finds no text model in it, or a number is none.
    """
    if getattr(config, "is_encoder_decoder", False):
        return  # refused as such by whoever builds the model
    remedy = "It is damaged, or newer than this transformers."
    with foreign(ModelError, f"{name}: the configuration describes no text model", remedy):
        text = config.get_text_config()
        numbers = {key: getattr(text, key, None) for key in _LEAST}
    for key, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < _LEAST[key]):
            raise ModelError(
                f"{name}: {key} is {brief(repr(value))}.", f"Write a whole number of at least {_LEAST[key]} there."
            )
