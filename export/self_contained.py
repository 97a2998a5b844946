"""The result as it is, with the code that multiplies by its forms beside the weights.

When to use: for transformers without lrc, with `trust_remote_code=True`. The model type is one that transformers does not know,
so that a reader without that flag is refused loudly. The code is a copy of lrc's own files for forms (compress/forms/) and two
short files: the configuration, and the model, a subclass of the original architecture that installs the forms.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch

from .. import compress
from ..checkpoint.architecture import auto_class
from ..errors import RequestError
from ..model.layerwise import in_memory
from .base import Drawing, Format, Tensors, export_format

_ROOT = Path(compress.__file__).resolve().parents[1]  # the folder of the package
_PREFIX = "lrc_"
_CONFIGURATION, _MODELLING = "configuration_lrc", "modeling_lrc"


@export_format(
    "self-contained",
    about="the compressed weights with their modelling code",
    opened_by="transformers with trust_remote_code=True",
)
class SelfContained(Format):
    """The compressed tensors, and code that transformers loads with them."""

    trusted: ClassVar[bool] = True

    def draw(self) -> Drawing:
        """Say what the export will be.

        Raises:
            RequestError: the model is code of the checkpoint.
        """
        view = self.source.view
        for cls in (type(view.config), type(view.model)):
            if not cls.__module__.startswith("transformers.models."):
                raise RequestError(
                    f"'{cls.__name__}' is code of the checkpoint, not of transformers, so a subclass of it cannot be written.",
                    "Load the result with lrc, or export it with --to dense.",
                )
        # the files of forms check their specs with pydantic
        return Drawing(self.source.nbytes(view.model.state_dict(), self.dtype), needs=("transformers", "pydantic"))

    def parts(self) -> Iterator[Tensors]:
        view, tied = self.source.view, self.source.view.tied
        for name in view.layer_names:
            with in_memory(self.source.view, name) as layer:
                yield {f"{name}.{path}": self._cast(tensor) for path, tensor in layer.state_dict().items()}
        for part in self.source.outside():
            yield {name: self._cast(tensor) for name, tensor in part.items() if name not in tied}

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        model_type, model_class = self.source.view.config.model_type, type(self.source.view.model).__name__
        opener = auto_class(self.source.view.model)
        if not opener.startswith("Auto"):  # of a class that no mapping knows
            opener = "AutoModelForCausalLM"
        auto = {"AutoConfig": f"{_CONFIGURATION}.Config", opener: f"{_MODELLING}.{model_class}"}
        return self.source.plain_config() | {
            "model_type": f"{_PREFIX}{model_type}",
            "architectures": [model_class],
            "auto_map": auto,
            "dtype": str(self.dtype).removeprefix("torch."),
            "lrc_version": version("lrc"),
            "lrc_modules": self.source.specs,
        }

    def files(self) -> dict[str, bytes]:
        """The code that transformers loads with the weights."""
        config, model = type(self.source.view.config), type(self.source.view.model)
        code = {f"{_PREFIX}{path.stem}.py": flattened(path) for path in _closure()}
        code[f"{_CONFIGURATION}.py"] = _CONFIG_FILE.format(
            module=config.__module__, base=config.__name__, type=f"{_PREFIX}{self.source.view.config.model_type}"
        )
        forms = "\n".join(f"from .{_PREFIX}{path.stem} import MODULES as _{path.stem}" for path in _forms())
        code[f"{_MODELLING}.py"] = _MODEL_FILE.format(
            module=model.__module__, base=model.__name__, configuration=_CONFIGURATION, forms=forms, prefix=_PREFIX
        )
        return {name: text.encode() for name, text in code.items()}


_CONFIG_FILE = '''"""The configuration of a checkpoint that lrc compressed: the original's, with the forms of its modules."""

from {module} import {base}


class Config({base}):
    """`lrc_modules`: module path -> the form of its weight."""

    model_type = "{type}"

    def __init__(self, *args, lrc_modules=None, lrc_version="", **kwargs):
        super().__init__(*args, **kwargs)
        self.lrc_modules = lrc_modules or {{}}
        self.lrc_version = lrc_version
'''

_MODEL_FILE = '''"""A model that lrc compressed: the original architecture, with the forms' modules in place of its matrices."""

import {module} as original

from .{configuration} import Config
from .{prefix}install_forms import install_forms
{forms}


class {base}(original.{base}):
    """The original architecture with compressed weights."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        install_forms(self, config.lrc_modules, self.dtype)

    # transformers reads the text of a model's file to answer these: the original's file has the answer
    @classmethod
    def _can_set_experts_implementation(cls):
        return original.{base}._can_set_experts_implementation()

    @classmethod
    def _can_set_attn_implementation(cls):
        return original.{base}._can_set_attn_implementation()
'''


def _forms() -> list[Path]:
    """The files of forms that register modules."""
    folder = _ROOT / "compress" / "forms"
    return sorted(path for path in folder.rglob("*.py") if "\nMODULES[" in path.read_text())


def _closure() -> list[Path]:
    """The files of forms, and all files of lrc that these import."""
    waiting = [_ROOT / "compress" / "install_forms.py", *_forms()]
    found: list[Path] = []
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.append(path)
            waiting += [imported for node in _relative(path) for imported in _files(path, node)]
    names = [path.stem for path in found]
    assert len(set(names)) == len(names), "two copied files would have the same name"
    return sorted(found)


def _relative(path: Path) -> list[ast.ImportFrom]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level > 0]


def _files(path: Path, node: ast.ImportFrom) -> list[Path]:
    """The files that a relative import reads."""
    folder = path.parents[node.level - 1]
    assert node.module is not None, f"{path}: write `from .module import name`; a folder cannot be copied"
    return [folder.joinpath(*node.module.split(".")).with_suffix(".py")]


def flattened(path: Path) -> str:
    """The text of a file of lrc with its relative imports rewritten, so that it works beside the others in one folder."""
    lines = path.read_text().splitlines(keepends=True)
    for node in _relative(path):
        (imported,) = _files(path, node)
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(
            f"from {'.' * node.level}{node.module} import", f"from .{_PREFIX}{imported.stem} import"
        )
    return (
        f"# Copied by `lrc export` from lrc {version('lrc')}, {path.relative_to(_ROOT).as_posix()} (Apache-2.0).\n"
        + "".join(lines)
    )
