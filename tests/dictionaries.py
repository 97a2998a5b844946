"""Dictionary methods by name, for tests of them."""

from __future__ import annotations

import torch

from lrc.compress.base import get_method
from lrc.compress.options import Shape

NAMES = ["compot", "cospadi"]


def solve(name: str, weight: torch.Tensor, stats, **settings):
    chosen = get_method(name)
    return chosen.solve(weight, stats, chosen.settings(**settings))


def options(name: str, shape: Shape, **settings):
    chosen = get_method(name)
    return chosen.options(shape, chosen.settings(**settings), 1)
