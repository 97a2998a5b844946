"""Tables that are computed once and kept, inside and outside of compiled code."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from ....cuda.dispatch import NAMESPACE


def table(fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Keep what a function of numbers, a device and a dtype returned for the same arguments; do not write to it.

    torch.compile would trace the function and compute the table at every call of the compiled code; for it the function is an
    operator. A table that is made under `torch.inference_mode` could not be part of a backward pass later: it is made outside.

    Args:
        fake: of the same arguments; returns an empty tensor of the table's shape, dtype and device.
    """

    def register(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept = lru_cache(maxsize=4096)(torch.inference_mode(mode=False)(make))

        @wraps(make)
        def copied(*args: Any) -> Tensor:
            return kept(*args).clone()  # compiled code may write to what an operator returned

        operator = torch.library.custom_op(f"{NAMESPACE}::{make.__name__.strip('_')}", copied, mutates_args=())
        operator.register_fake(fake)

        @wraps(make)
        def call(*args: Any) -> Tensor:
            found: Tensor = operator(*args) if torch.compiler.is_compiling() else kept(*args)
            return found

        return call

    return register
