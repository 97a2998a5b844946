"""A finished result as an export reads it: its modules' specs, and its weights layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import read_record, saved_by_transformers
from ..checkpoint.hf_quantizer import WITHOUT_LRC, install_stored
from ..checkpoint.location import Location
from ..compress.forms.base import Spec
from ..model.view import ModelView


@dataclass(frozen=True)
class Source:
    """A finished result.

    Args:
        folder: its folder.
        record: the content of lrc.json; empty for a copy that save_pretrained wrote.
        view: the compressed model; weights are loaded layer by layer.
    """

    folder: Path
    record: dict[str, Any]
    view: ModelView

    @classmethod
    def open(cls, folder: Path, trust_remote_code: bool = False) -> Source:
        """Open a finished result.

        Raises:
            CheckpointError: the folder holds none, or it is damaged.
        """
        record = {} if saved_by_transformers(folder) else read_record(folder)
        return cls(folder, record, _opened(folder, None, trust_remote_code))

    def widened(self) -> Source:
        """The same result, its weights held in float32."""
        return Source(self.folder, self.record, _opened(self.folder, torch.float32, self.view.trust_remote_code))

    @cached_property
    def stored_config(self) -> dict[str, Any]:
        """The content of the result's config.json."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return config

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Module path -> spec of its form; empty for a result that needs no lrc."""
        modules: dict[str, Spec] = self.stored_config.get("quantization_config", {}).get("modules", {})
        return modules

    def plain_config(self) -> dict[str, Any]:
        """The result's config.json without the forms."""
        return {key: value for key, value in self.stored_config.items() if key not in ("quantization_config", *WITHOUT_LRC)}

    @cached_property
    def plain_model(self) -> Any:
        """The model of `plain_config` on the meta device: what the original architecture stores."""
        return self.built(self.plain_config())

    def built(self, config: dict[str, Any]) -> Any:
        """A model of the same architecture with another configuration, on the meta device."""
        with torch.device("meta"):
            return type(self.view.model)(type(self.view.config).from_dict(config))

    def nbytes(self, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> int:
        """Bytes of these tensors of a model with floating-point ones in `dtype`, tied ones counted once."""
        counted = (tensor for name, tensor in state.items() if name not in self.view.tied)
        return sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.element_size()) for t in counted)

    def outside(self) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors outside the layers, part by part, by their names in the model."""
        for part in self.view.outside_parts():
            self.view.load_outside(part)
            yield self.view.outside_tensors(part)
            self.view.unload()


def _opened(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool) -> ModelView:
    return ModelView(Location(str(folder), folder), dtype, trust_remote_code, prepare=install_stored)
