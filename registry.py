"""What registers itself on import: the modules of a package, one file each."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


@functools.cache  # names are looked up for every target
def import_all(package: str) -> None:
    """Import every module of a package, once."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)


def first_line(registered: Callable[..., Any], name: str) -> str:
    """The first line of what the file that defines this says of itself; its name where it says nothing."""
    return (importlib.import_module(registered.__module__).__doc__ or name).strip().splitlines()[0]
