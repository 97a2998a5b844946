"""What registers itself on import: the modules of a package, one file each."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


def import_all(package: str) -> None:
    """Import every module in all folders of a package; a folder that someone adds to its `__path__` later counts, too."""
    _import_from(package, tuple(importlib.import_module(package).__path__))


@functools.cache  # names are looked up for every target
def _import_from(package: str, folders: tuple[str, ...]) -> None:
    for module in pkgutil.iter_modules(folders, package + "."):
        importlib.import_module(module.name)


def first_line(registered: Callable[..., Any], name: str) -> str:
    """The first line of what the file that defines this says of itself; its name where it says nothing."""
    return (importlib.import_module(registered.__module__).__doc__ or name).strip().splitlines()[0]
