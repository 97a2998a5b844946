"""Modules that register themselves on import, one file each, in a package and in the folders inside it."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any


def import_all(package: str) -> None:
    """Import every module of a package and of the packages inside it; folders added to its `__path__` later count, too."""
    _import_from(package, tuple(importlib.import_module(package).__path__))


@functools.cache  # names are looked up for every target
def _import_from(package: str, folders: tuple[str, ...]) -> None:
    for module in pkgutil.walk_packages(folders, package + ".", onerror=_stop):
        importlib.import_module(module.name)


def _stop(name: str) -> None:
    """Let the error of a package that cannot be imported be seen: `walk_packages` hides an ImportError by itself."""
    raise  # noqa: PLE0704  # called while the error is handled


def first_line(registered: Callable[..., Any], name: str) -> str:
    """The first line of what the file that defines this says of itself; its name where it says nothing."""
    return (importlib.import_module(registered.__module__).__doc__ or name).strip().splitlines()[0]
