"""Registries that fill themselves: every module of a package is imported, and registers what it defines on import."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def import_all(package: str) -> None:
    """Import every module of a package and of the packages inside it.

    A new file is found wherever it is put: in the package's folder, in a folder inside it, in a new folder with an
    `__init__.py`, or in a folder that was added to a package's `__path__`.

    Raises:
        ImportError: a folder has Python files and no `__init__.py`: it is not a package, and its files would not be found.
    """
    _import_from(package, tuple(importlib.import_module(package).__path__))


@functools.cache  # methods are looked up by name for every target
def _import_from(package: str, folders: tuple[str, ...]) -> None:
    _require_packages(folders)
    for module in pkgutil.walk_packages(folders, package + ".", onerror=_stop):
        imported = importlib.import_module(module.name)
        if module.ispkg:
            _require_packages(imported.__path__)


def _require_packages(folders: Iterable[str]) -> None:
    for folder in map(Path, folders):
        for inner in sorted({file.parent for file in folder.glob("*/*.py")}):
            if inner.name.isidentifier() and not (inner / "__init__.py").exists():
                raise ImportError(f"{inner} has Python files and no __init__.py, so they are not found: add an empty one")


def _stop(name: str) -> None:
    """Raise the error of a package that cannot be imported again: `walk_packages` would hide an ImportError."""
    raise  # noqa: PLE0704  # called while the error is handled


def first_line(registered: Callable[..., Any], name: str) -> str:
    """The first line of the docstring of the module that defines this function or class; `name` if there is none."""
    return (importlib.import_module(registered.__module__).__doc__ or name).strip().splitlines()[0]
