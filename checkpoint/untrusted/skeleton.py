"""Building a model of a configuration that anyone may have written."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ..architecture import built
from .foreign import foreign

# Rotary tables take kilobytes, causal masks of old architectures up to 150 MB.
_BUFFERS = 1 << 30  # bytes
# A stored number stands for some weights (codes, factors of a low rank), hardly for a thousand. The loader compares tensors;
# this keeps a forged size from asking for memory before.
_PER_NUMBER, _FEW = 1000, 1 << 26


def require_affordable(config: Any, name: str, held: int | None = None) -> Any:
    """Build the model without memory, and refuse one whose tables would be made with gigabytes.

    Buffers (rotary tables, masks) are computed when a model is built; a forged number of positions makes them huge. The weights
    are compared with the files later, before any of them is in memory.

    Args:
        config: a transformers configuration.
        name: of the model, for messages.
        held: how many numbers the weight files hold; None where that is not known.

    Returns:
        The model on the meta device.

    Raises:
        ModelError: transformers cannot build the model, its buffers are too large, or it has far more weights than the files.
    """
    with building(config), torch.device("meta"):
        model = built(copy.deepcopy(config), torch.get_default_dtype())
    nbytes = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if nbytes > _BUFFERS:
        raise ModelError(
            f"{name}: the tables that config.json asks for take {nbytes:,} bytes; no known model needs {_BUFFERS:,}.",
            "Its numbers of positions or heads are damaged: get it again.",
        )
    wanted = sum(parameter.numel() for parameter in model.parameters())
    if held is not None and wanted > _PER_NUMBER * held + _FEW:
        raise ModelError(
            f"{name}: the model of config.json has {wanted:,} numbers, and the weight files hold {held:,}.",
            "A size in config.json is damaged, or the checkpoint is incomplete: get it again.",
        )
    return model


def building(config: Any) -> Any:
    """The boundary at which transformers builds a model; see `foreign`."""
    return foreign(
        ModelError,
        f"transformers cannot build a language model of type '{config.model_type}' from its configuration",
        "If its code comes with the checkpoint and you trust it, add --trust-remote-code; if not, config.json is damaged, a "
        "package that the model needs is missing, or transformers has no language model of this type.",
    )


def require_finite_tables(model: nn.Module, name: str) -> None:
    """Refuse a model whose computed tables are not finite: a NaN or a zero in its rotary settings would reach every logit.

    Raises:
        ModelError: a table holds a NaN, or a rotary one an infinity.
    """
    for path, table in model.named_buffers():
        if table.is_meta or not table.is_floating_point() or not table.numel():
            continue
        rotary = "inv_freq" in path or "rotary" in path or "rope" in path
        if table.isnan().any() or (rotary and not table.isfinite().all()):
            raise ModelError(
                f"{name}: the table '{path}', computed from config.json, is not finite.",
                "A number in its settings of positions (rope_theta, rope_scaling, head_dim) is damaged: get it again.",
            )
