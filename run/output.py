"""Everything that a run writes besides the layers: the other tensors, configuration, record, model card, tokenizer files."""

from __future__ import annotations

import functools
import json
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.beside import files_beside
from ..checkpoint.folder import UNCHECKED
from ..checkpoint.hf_quantizer import FORMAT_VERSION, METHOD, WITHOUT_LRC
from ..checkpoint.journal import without_paths
from ..checkpoint.merging import part_name
from ..compress.forms.base import Spec
from ..model.machine.host_memory import give_back
from ..model.view import ModelView
from ..plan.plan import Plan
from .layer_loop import renamed, staying_layers
from .model_card import Origin, model_card
from .run import Run
from .verify import verify


def part_names(plan: Plan, view: ModelView) -> dict[str, str]:
    """Name of a layer that is not pruned, or of a part outside the layers -> name of its file until it is merged."""
    keys = [*staying_layers(view, plan), *(f"outside.{number}" for number in range(len(view.outside_parts())))]
    return {key: part_name(number, len(keys)) for number, key in enumerate(keys, 1)}


def write_outside(plan: Plan, run: Run, parts: Mapping[str, str]) -> None:
    """Write the tensors outside the layers to the artifact, part by part."""
    view, artifact = run.view, run.artifact
    changed = plan.model_edit.outside_tensors()
    for number, part in enumerate(view.outside_parts()):
        key = f"outside.{number}"
        if key not in artifact.done:
            view.load_outside(part)
            held = view.outside_tensors(part)
            artifact.write(key, parts[key], held | {n: t for n, t in changed.items() if n in held}, {})
            view.unload()
            give_back()


def config_of(plan: Plan, run: Run) -> dict[str, Any]:
    """The content of config.json."""
    view, artifact = run.view, run.artifact
    staying = staying_layers(view, plan)
    modules: dict[str, Any] = {}
    for name in staying:
        record = artifact.done[name].record
        specs = {path: _with_owner_renamed(spec, name, staying[name]) for path, spec in record["forms"].items()}
        modules |= renamed(specs | record["edits"], name, staying[name])
    config = json.loads(view.config.to_json_string()) if plan.shallower is None else dict(plan.shallower)
    config.pop("transformers_weights", None)  # named a file of the original
    config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config["architectures"] = [type(view.model).__name__]
    if not view.trust_remote_code:
        config.pop("auto_map", None)  # names code that was not run and is not copied
    if modules:
        config |= WITHOUT_LRC
        config["quantization_config"] = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "lrc_version": version("lrc"),
            "modules": modules,
        }
    return config


def finish(plan: Plan, run: Run, config: Mapping[str, Any], refinement: dict[str, Any] | None) -> None:
    """Write the record, the model card and the tokenizer's files, check the result, and create config.json last.

    Args:
        plan: the final plan.
        run: the run; all shards of its artifact are written.
        config: the content of config.json.
        refinement: the record of an end-to-end refinement; None if there was none.

    Raises:
        CheckpointError, NonFiniteError: the result fails the check.
        OutputError: a file cannot be written.
    """
    view, artifact, calibration = run.view, run.artifact, run.calibration
    origin = Origin.of(view.location)
    records = [artifact.done[name].record for name in staying_layers(view, plan)]
    record = {
        "versions": {name: version(name) for name in ("lrc", "torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
        "model": plan.model | {"name": origin.name} | artifact.identity["model"],
        "recipe": without_paths(plan.recipe.resolved()),
        "calibration": {"hash": calibration.hash, "provenance": without_paths(calibration.provenance)},
        "bytes": {
            "targets_before": plan.targets_before,
            "targets_after": plan.targets_after,
            "model_before": plan.whole_bytes,
            "model_after": plan.whole_after,
        },
        "ratio": plan.ratio,
        "searched": None if plan.found is None else asdict(plan.found),
        "ratio_of_whole_model": plan.whole_ratio,
        "targets": [target for entry in records for target in entry["targets"]],
        "layers": {
            name: {key: value for key, value in entry.items() if key not in ("forms", "edits", "targets")}
            for name, entry in zip(staying_layers(view, plan).values(), records, strict=True)
        },
        "dropped_layers": list(plan.dropped),
        "refinement": refinement,
        "depth": {"removed": list(plan.model_edit.removed), **plan.model_edit.record},
        "kept": [asdict(kept) for kept in plan.kept],
        "left_out": [asdict(kept) for kept in plan.left_out],
        "files_left_out": {reason: list(names) for reason, names in plan.files_left_out.items()},
    }
    check = functools.partial(
        verify, artifact.folder, hashes=False, config_file=UNCHECKED, trust_remote_code=view.trust_remote_code
    )
    card = model_card(plan, view.model, record, origin, plain="quantization_config" not in config)
    artifact.finish(config, record, card, _beside(view), check)


def _with_owner_renamed(spec: Spec, old: str, new: str) -> Spec:
    """A form's spec with the new path of the module whose factor it shares, where that module is in the renumbered layer."""
    owner = spec.get("owner", "")
    return spec | {"owner": new + owner.removeprefix(old)} if owner.startswith(old + ".") else spec


def _beside(view: ModelView) -> dict[str, bytes]:
    """Path inside the artifact -> content, for the files that belong to the model beside its weights.

    They are copied from the model's folder by the rule of checkpoint/beside.py; for GGUF transformers writes the tokenizer.
    Where the checkpoint's own code was not trusted it is not copied, and the references to it are removed.
    """
    trusted = view.trust_remote_code
    if not view.location.gguf:
        files = {name: path.read_bytes() for name, path in view.location.beside(code=trusted).files.items()}
        return files if trusted else {name: _without_code(name, content) for name, content in files.items()}
    with tempfile.TemporaryDirectory() as folder:
        view.location.tokenizer().save_pretrained(folder)
        if generation := getattr(view.model, "generation_config", None):
            generation.save_pretrained(folder)
        return {name: path.read_bytes() for name, path in files_beside(Path(folder)).files.items()}


def _without_code(name: str, content: bytes) -> bytes:
    """A configuration without its references to code that is not copied; other files as they are."""
    if not name.endswith("config.json") or b"auto_map" not in content:
        return content
    try:
        held = json.loads(content)
    except ValueError:
        return content  # no reader of it finds code in it either
    if not isinstance(held, dict) or not held.pop("auto_map", None):
        return content
    return (json.dumps(held, indent=2, ensure_ascii=False) + "\n").encode()
