"""What depth does to one model: layers and sub-layers that go, edits of those that stay, and why; kept on disk.

Finding it can cost hours, so it lies in a folder beside the unfinished artifact and is read again, layer by layer, by the run
that stores the result and by one that continues it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.atomic import read_json, replacing, write_json
from ..compress.forms.base import Spec
from ..model.layer_edit import LayerEdit, LinearMap
from ..model.sublayers import SubLayer
from ..model.targets import Target

_FILE = "model_edit.json"
_OUTSIDE = "outside"


@dataclass(frozen=True)
class ModelEdit:
    """What goes, and what is changed.

    Args:
        dropped: layers that go, ascending.
        removed: names of the sub-layers that go.
        zeroed: their targets.
        edits: layer name -> its edit, where they are held in memory.
        outside: parameters outside the layers -> new values, where they are held in memory.
        maps: layer name -> {module path in it: spec} of every map, for the plan's bytes.
        record: what was found on the way, for `lrc.json`.
        folder: where edits lie, None where there are none or they are held in memory.
    """

    dropped: tuple[int, ...] = ()
    removed: tuple[str, ...] = ()
    zeroed: tuple[Target, ...] = ()
    edits: Mapping[str, LayerEdit] = field(default_factory=dict)
    outside: Mapping[str, Tensor] = field(default_factory=dict)
    maps: Mapping[str, Mapping[str, Spec]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @classmethod
    def without(cls, sublayers: Sequence[SubLayer], record: Mapping[str, Any] | None = None) -> ModelEdit:
        """These sub-layers go."""
        zeroed = tuple(target for sublayer in sublayers for target in sublayer.targets)
        return cls((), tuple(sublayer.name for sublayer in sublayers), zeroed, record=record or {})

    def edit(self, layer: str) -> LayerEdit | None:
        """What is changed in a layer; reads its file."""
        gone = tuple(target for target in self.zeroed if target.name.startswith(layer + "."))
        found = self.edits.get(layer)
        if self.folder is not None and (self.folder / f"{layer}.safetensors").is_file():
            found = _edit(load_file(self.folder / f"{layer}.safetensors"), self.maps.get(layer, {}))
        if gone:
            found = LayerEdit(gone).with_others(found) if found else LayerEdit(gone)
        return found

    def outside_tensors(self) -> dict[str, Tensor]:
        """New values of parameters outside the layers; reads their file."""
        if self.folder is not None and (self.folder / f"{_OUTSIDE}.safetensors").is_file():
            return load_file(self.folder / f"{_OUTSIDE}.safetensors")
        return dict(self.outside)

    @property
    def added(self) -> int:
        """Numbers that maps add to the model."""
        specs = [spec for layer in self.maps.values() for spec in layer.values()]
        return sum(spec["width"] * (spec["width"] + (1 if spec["bias"] else 0)) for spec in specs)

    def write(self, folder: Path, identity: Mapping[str, Any]) -> ModelEdit:
        """Put it into a folder, in the place of another one; returns the same, read from there when needed."""
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in (folder / _FILE, *folder.glob("*.safetensors")):
            earlier.unlink(missing_ok=True)
        for layer, edit in self.edits.items():
            tensors = {f"tensor:{path}": value.contiguous() for path, value in edit.tensors.items()}
            for path, each in edit.maps.items():
                tensors[f"map:{path}:weight"] = each.weight.contiguous()
                if each.bias is not None:
                    tensors[f"map:{path}:bias"] = each.bias.contiguous()
            _save(folder / f"{layer}.safetensors", tensors)
        if self.outside:
            _save(folder / f"{_OUTSIDE}.safetensors", {name: value.contiguous() for name, value in self.outside.items()})
        maps = {layer: {path: each.spec for path, each in edit.maps.items()} for layer, edit in self.edits.items() if edit.maps}
        zeroed = [target.name for target in self.zeroed]
        held = _Held(dict(identity), self.dropped, self.removed, zeroed, maps, dict(self.record))
        write_json(folder / _FILE, held)  # the last to appear: edits without it are written again
        return ModelEdit(self.dropped, self.removed, self.zeroed, maps=maps, record=self.record, folder=folder)


@dataclass(frozen=True)
class _Held:
    """A model edit's file; `identity` is of the run that found it, `zeroed` names targets, tensors lie beside it."""

    identity: dict[str, Any]
    dropped: tuple[int, ...]
    removed: tuple[str, ...]
    zeroed: list[str]
    maps: dict[str, dict[str, Spec]]
    record: dict[str, Any]


def read_model_edit(folder: Path, identity: Mapping[str, Any], targets: Sequence[Target]) -> ModelEdit | None:
    """What an interrupted run of the same identity found; None where there is nothing of it."""
    held = read_json(folder / _FILE, _Held)
    if held is None or held.identity != json.loads(json.dumps(identity)):
        return None
    named = {target.name: target for target in targets}
    zeroed = tuple(named[name] for name in held.zeroed)
    return ModelEdit(held.dropped, held.removed, zeroed, maps=held.maps, record=held.record, folder=folder)


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(file) as temporary:
        save_file(dict(tensors), temporary)


def _edit(tensors: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> LayerEdit:
    return LayerEdit(
        (),
        {key.removeprefix("tensor:"): value for key, value in tensors.items() if key.startswith("tensor:")},
        {
            path: LinearMap(tensors[f"map:{path}:weight"], tensors.get(f"map:{path}:bias"), spec["side"])
            for path, spec in specs.items()
        },
    )
