"""The model that a configuration describes, on the meta device, and what its layers are built of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch.overrides import TorchFunctionMode

from ...checkpoint.streamed import Checkpoint
from ...compress.forms.experts import IMPLEMENTATION
from ...errors import one_line
from .tracing import structure

# what transformers raises where a configuration that was only tried makes no sense
NOT_BUILT: tuple[type[Exception], ...] = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
NOT_BUILT += (AssertionError, StopIteration, StrictDataclassError)
_DRAWN = {"normal_", "uniform_", "zero_", "fill_", "copy_", "erfinv_", "clamp_", "mul_", "add_"}


def built(config: Any, view: Checkpoint) -> Any:
    """The model with parameters on the meta device; buffers are computed."""
    from accelerate import init_empty_weights

    config._experts_implementation = IMPLEMENTATION
    with init_empty_weights(include_buffers=False), _Undrawn():
        model = type(view.model)._from_config(config, dtype=view.dtype)
    model.tie_weights()
    model.eval()
    model.requires_grad_(False)
    return model


class _Undrawn(TorchFunctionMode):
    """While the context is open, parameters on the meta device are not initialised, which takes most of a model's building."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave out what only sets values that a tensor on the meta device does not have."""
        given = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWN:
            tensor = args[0] if args else given.get("tensor")  # torch.nn.init names it
            if tensor is not None and tensor.is_meta:
                return tensor
        return func(*args, **given)


def structures(layers: Sequence[Any], config: Any) -> list[dict[str, Any]]:
    """What every layer is built of, and the kind of its cache where there is one for each layer."""
    found = [structure(layer) for layer in layers]
    for each, cache in zip(found, _caches(config, len(layers)), strict=False):
        each["cache:"] = cache
    return found


def _caches(config: Any, layers: int) -> list[Any]:
    from transformers import DynamicCache

    try:
        made = DynamicCache(config=config).layers
    except NOT_BUILT:
        return []  # a model that makes its cache in another way
    return [(type(each).__qualname__, getattr(each, "sliding_window", None)) for each in made] if len(made) == layers else []


def numbered(structures: Sequence[Mapping[str, Any]]) -> set[str]:
    """Settings that are the layer's own number in every layer that has them, such as `self_attn:layer_idx`."""
    found = set[str]()
    for key in {key for each in structures for key in each}:
        held = [(place, each[key]) for place, each in enumerate(structures) if key in each]
        named = any(word in key.rpartition(":")[2] for word in ("layer", "idx"))
        if (len(held) > 1 or named) and all(type(value) is int and value == place for place, value in held):
            found.add(key)
    return found


def unbuilt(error: Exception) -> str:
    """Why there is no model, in words."""
    return f"transformers cannot build or run the model of its configuration ({type(error).__name__}: {one_line(error)})"


@contextmanager
def quiet() -> Iterator[None]:
    """While the context is open, configurations that are only tried give no warning."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
