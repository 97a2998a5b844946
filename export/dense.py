"""Every form multiplied out: plain safetensors of the original architecture, under the names that the hub uses.

When to use: for tools that know nothing of lrc or of quantization. It has the result's accuracy and the original's size, except
that pruned layers stay away, and pruned channels where every layer has lost some.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .base import Drawing, Format, Tensors, export_format
from .multiplied import Multiplied
from .source import Source


@export_format("dense", about="every matrix multiplied out, plain safetensors", opened_by="everything that opens the original")
class Dense(Format):
    """Plain safetensors of the original architecture."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.multiplied = Multiplied(source, self.name)
        super().__init__(source, dtype)

    def draw(self) -> Drawing:
        return Drawing(self.multiplied.nbytes(self.dtype))

    def parts(self) -> Iterator[Tensors]:
        from transformers.core_model_loading import revert_weight_conversion

        for part in self.multiplied.parts(self.dtype):
            yield revert_weight_conversion(self.multiplied.model, part)

    def config(self) -> dict[str, Any]:
        return self.multiplied.config | {"dtype": str(self.dtype).removeprefix("torch.")}
