"""Tables that are computed once and kept, and that are constants for torch.compile, too."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

T = TypeVar("T")


def constant(make: Callable[..., T]) -> Callable[..., T]:
    """Keep what a function returned for the same arguments; do not write to it.

    torch.compile would trace the function and compute its table at every call of the compiled code. A table that is made under
    `torch.inference_mode` could not be part of a backward pass later, so it is made outside of it.
    """
    kept = lru_cache(maxsize=4096)(torch.inference_mode(mode=False)(make))

    @wraps(make)
    def call(*args: Hashable) -> T:
        return kept(*args)

    found: Callable[..., T] = torch.compiler.assume_constant_result(call)
    return found
