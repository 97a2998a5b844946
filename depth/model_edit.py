"""The change that depth makes to one model: removed layers and sub-layers, edits of the others, and a record of the reasons.

Finding it can take hours. So it is kept in a folder beside the unfinished artifact; the run that stores the result reads it
from there layer by layer, and so does a run that continues an interrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.atomic import checked_tensors, read_json, write_json, write_tensors
from ..compress.forms.base import Spec
from ..model.layer_edit import LayerEdit, LinearMap
from ..model.sublayers import SubLayer
from ..model.targets import Target

_FILE = "model_edit.json"
_OUTSIDE = "outside"


@dataclass(frozen=True)
class ModelEdit:
    """Layers and sub-layers that are removed, and edits of the others.

    Args:
        dropped: removed layers, ascending.
        removed: names of the removed sub-layers.
        zeroed: the targets of the removed sub-layers.
        edits: layer name -> its edit; empty where edits are on disk.
        outside: parameter outside the layers -> new value; empty where edits are on disk.
        maps: layer name -> {module path in the layer: spec} of every map, for the plan's bytes.
        record: losses and choices, for `lrc.json`.
        folder: where edits are on disk; None where there are none or they are in memory.
        stored: names of the files in `folder`, without suffix.
    """

    dropped: tuple[int, ...] = ()
    removed: tuple[str, ...] = ()
    zeroed: tuple[Target, ...] = ()
    edits: Mapping[str, LayerEdit] = field(default_factory=dict)
    outside: Mapping[str, Tensor] = field(default_factory=dict)
    maps: Mapping[str, Mapping[str, Spec]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    stored: tuple[str, ...] = ()

    @classmethod
    def without(cls, sublayers: Sequence[SubLayer], record: Mapping[str, Any] | None = None) -> ModelEdit:
        """The model edit that removes these sub-layers."""
        zeroed = tuple(target for sublayer in sublayers for target in sublayer.targets)
        return cls((), tuple(sublayer.name for sublayer in sublayers), zeroed, record=record or {})

    def edit(self, layer: str) -> LayerEdit | None:
        """The edit of a layer, None where it has none; reads it from disk where it is there."""
        gone = tuple(target for target in self.zeroed if target.name.startswith(layer + "."))
        found = self.edits.get(layer)
        if self.folder is not None and layer in self.stored:
            found = _edit(_load(self.folder / f"{layer}.safetensors"), self.maps.get(layer, {}))
        if gone:
            found = LayerEdit(gone).with_others(found) if found else LayerEdit(gone)
        return found

    def outside_tensors(self) -> dict[str, Tensor]:
        """New values of parameters outside the layers; reads them from disk where they are there."""
        if self.folder is not None and _OUTSIDE in self.stored:
            return _load(self.folder / f"{_OUTSIDE}.safetensors")
        return dict(self.outside)

    @property
    def added(self) -> int:
        """How many parameters maps add to the model."""
        specs = [spec for layer in self.maps.values() for spec in layer.values()]
        return sum(spec["width"] * (spec["width"] + (1 if spec["bias"] else 0)) for spec in specs)

    def write(self, folder: Path, identity: Mapping[str, Any]) -> ModelEdit:
        """Write it into a folder in place of an earlier one; returns a model edit that reads its edits from there."""
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in (folder / _FILE, *folder.glob("*.safetensors")):
            earlier.unlink(missing_ok=True)
        for layer, edit in self.edits.items():
            tensors = {f"tensor:{path}": value for path, value in edit.tensors.items()}
            for path, each in edit.maps.items():
                tensors[f"map:{path}:weight"] = each.weight
                if each.bias is not None:
                    tensors[f"map:{path}:bias"] = each.bias
            write_tensors(folder / f"{layer}.safetensors", tensors, sync=True)
        if self.outside:
            write_tensors(folder / f"{_OUTSIDE}.safetensors", self.outside, sync=True)
        maps = {layer: {path: each.spec for path, each in edit.maps.items()} for layer, edit in self.edits.items() if edit.maps}
        zeroed = [target.name for target in self.zeroed]
        stored = (*self.edits, *([_OUTSIDE] if self.outside else []))
        held = _Held(dict(identity), self.dropped, self.removed, zeroed, maps, dict(self.record), stored)
        write_json(folder / _FILE, held)  # written last: without this file, edits are found and written again
        return ModelEdit(self.dropped, self.removed, self.zeroed, maps=maps, record=self.record, folder=folder, stored=stored)


@dataclass(frozen=True)
class _Held:
    """The JSON file of a model edit: `identity` of the run that found it, names of `zeroed` targets; tensors have own files,
    which are `stored` under these names without suffix."""

    identity: dict[str, Any]
    dropped: tuple[int, ...]
    removed: tuple[str, ...]
    zeroed: list[str]
    maps: dict[str, dict[str, Spec]]
    record: dict[str, Any]
    stored: tuple[str, ...]


def read_model_edit(folder: Path, identity: Mapping[str, Any], targets: Sequence[Target]) -> ModelEdit | None:
    """The model edit that an interrupted run of the same identity wrote; None where there is none."""
    held = read_json(folder / _FILE, _Held)
    if held is None or held.identity != json.loads(json.dumps(identity)):
        return None
    named = {target.name: target for target in targets}
    zeroed = tuple(named[name] for name in held.zeroed)
    return ModelEdit(held.dropped, held.removed, zeroed, maps=held.maps, record=held.record, folder=folder, stored=held.stored)


def _load(file: Path) -> dict[str, Tensor]:
    remedy = f"Delete {_FILE} beside it and run the same command again: the layers to drop, and repairs, are computed anew."
    with checked_tensors(file, remedy) as held:
        return {name: held.get(name) for name in held.names()}


def _edit(tensors: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> LayerEdit:
    return LayerEdit(
        (),
        {key.removeprefix("tensor:"): value for key, value in tensors.items() if key.startswith("tensor:")},
        {
            path: LinearMap(tensors[f"map:{path}:weight"], tensors.get(f"map:{path}:bias"), spec["side"])
            for path, spec in specs.items()
        },
    )
