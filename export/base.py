"""The contract of an export format, and the registry of formats.

A format is one file in this folder: a subclass of `Format` under the decorator `export_format`. It says before any work what it
cannot carry and what it loses, and gives the tensors part by part; export/write.py does everything else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..checkpoint.architecture import auto_class
from ..compress.registry import import_all
from ..errors import RequestError, did_you_mean
from ..model.events import Notify
from .source import Source

Tensors = dict[str, Tensor]
LOADING = "## Load"  # the heading of the section about loading


@dataclass(frozen=True)
class Drawing:
    """What an export will be, known before any tensor is read.

    Args:
        nbytes: bytes of all tensors.
        lost: what the format does not carry, one sentence each; empty where it carries everything.
        needs: packages, as pip names them, that open the export.
    """

    nbytes: int
    lost: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("transformers",)


class Format(ABC):
    """One export of one result.

    Args:
        source: the finished result.
        dtype: of the floating-point tensors of the export.

    Raises:
        RequestError: the format cannot carry this result; the message names what, and a format that can.
    """

    name: ClassVar[str]
    about: ClassVar[str]  # what is written, in one line
    opened_by: ClassVar[str]  # the tools that open it
    tolerance: ClassVar[Mapping[torch.dtype, float]] = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self.drawing = self.draw()

    @abstractmethod
    def draw(self) -> Drawing:
        """Check that the format can carry the result, and say what the export will be. Reads no tensor."""

    @abstractmethod
    def parts(self) -> Iterator[Tensors]:
        """The tensors by their names in the export, a part at a time; a part is one layer, or less."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The content of config.json."""

    def write(self, folder: Path, notify: Notify) -> bool:
        """Write the weights in a way of the format's own; False where they are safetensors made of `parts`."""
        return False

    def files(self) -> dict[str, bytes]:
        """Name -> content of other files that the format needs."""
        return {}

    def beside(self) -> Tensors:
        """Tensors of an adapter beside the model; empty where the format has none."""
        return {}

    @property
    def checked_with(self) -> tuple[str, ...]:
        """The packages that `open` needs."""
        return self.drawing.needs

    def open(self, folder: str) -> Any:
        """The export as its consumer loads it: a model of transformers in float32."""
        import transformers

        kind = getattr(transformers, auto_class(self.source.view.model))
        return kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=self.trusted)

    def loading(self) -> str:
        """The section of the model card about loading."""
        return loading(self.source.view.model, trusted=self.trusted)

    @torch.no_grad()
    def difference(self, folder: Path, ids: Tensor, expected: Tensor) -> float:
        """Of the export's logits from the result's, relative to them (root mean square).

        Args:
            folder: of the export.
            ids: (1, tokens).
            expected: (1, tokens, vocabulary) the result's logits in float32.
        """
        found = self.open(str(folder)).eval()(ids, use_cache=False).logits.float()
        return float((found - expected).norm() / expected.norm())

    @property
    def allowed(self) -> float:
        """The largest difference of a right export."""
        return self.tolerance[self.dtype]

    trusted: ClassVar[bool] = False  # whether `open` runs code of the export; it is lrc's own
    copies: ClassVar[bool] = True  # whether the files beside the weights, and config.json, belong to the export


def loading(model: Any, before: str = "", trusted: bool = False) -> str:
    """The section about loading: the model by its class, and the tokenizer or processor.

    Args:
        model: of the architecture that is loaded.
        before: a line of code that goes first; '' for none.
        trusted: whether code of the checkpoint must run.
    """
    kind, more = auto_class(model), ", trust_remote_code=True" if trusted else ""
    reader = "AutoTokenizer" if model.config.get_text_config() is model.config else "AutoProcessor"
    name = "tokenizer" if reader == "AutoTokenizer" else "processor"
    return f"""{LOADING}

```python
{before + chr(10) if before else ""}from transformers import {", ".join(sorted((kind, reader)))}

model = {kind}.from_pretrained("PATH"{more})
{name} = {reader}.from_pretrained("PATH"{more})
```"""


F = TypeVar("F", bound=type[Format])
_FORMATS: dict[str, type[Format]] = {}


def export_format(name: str, *, about: str, opened_by: str) -> Any:
    """Register the decorated subclass of `Format` under this name."""

    def register(cls: F) -> F:
        cls.name, cls.about, cls.opened_by = name, about, opened_by
        _FORMATS[name] = cls
        return cls

    return register


def formats() -> dict[str, type[Format]]:
    """All formats by name. Every file in export/ is imported, and registers its format on import."""
    import_all(__package__ or "lrc.export")
    return dict(sorted(_FORMATS.items()))


def get_format(name: str) -> type[Format]:
    """The format of this name.

    Raises:
        RequestError: there is none; the message names the closest one.
    """
    known = formats()
    if name not in known:
        raise RequestError(f"There is no export format '{name}'.", did_you_mean(name, known))
    return known[name]


@dataclass
class Carried:
    """What a format can and cannot carry of a result's modules, collected before it refuses all at once.

    Args:
        refused: module path -> why.
    """

    refused: dict[str, str] = field(default_factory=dict)

    def require(self, name: str, instead: str) -> None:
        """Refuse if anything was refused.

        Raises:
            RequestError: names the format, the number of modules, and the first ones with their reasons.
        """
        if not self.refused:
            return
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.refused.items():
            by_reason.setdefault(reason, []).append(path)
        listed = "\n".join(
            f"  - {reason}: {len(paths)} modules, {paths[0]} first" for reason, paths in sorted(by_reason.items())
        )
        raise RequestError(f"The format '{name}' cannot carry {len(self.refused)} modules of this result:\n{listed}", instead)
