"""Everything that a run writes besides the layers: the other tensors, configuration, record, model card, tokenizer files."""

from __future__ import annotations

import copy
import functools
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint.artifact import UNCHECKED
from ..checkpoint.hf_quantizer import FORMAT_VERSION, METHOD
from ..checkpoint.location import Location
from ..compress.forms.base import Spec
from ..model.machine.host_memory import give_back
from ..model.view import ModelView
from ..plan.plan import Plan
from .layer_loop import renamed, staying_layers
from .model_card import model_card
from .run import Run
from .verify import verify


def shard_names(plan: Plan, view: ModelView) -> dict[str, str]:
    """Name of a layer that is not pruned, or of a part outside the layers -> name of its shard file."""
    keys = [*staying_layers(view, plan), *(f"outside.{number}" for number in range(len(view.outside_parts())))]
    return {key: f"model-{number:05d}-of-{len(keys):05d}.safetensors" for number, key in enumerate(keys, 1)}


def write_outside(plan: Plan, run: Run, shards: Mapping[str, str]) -> None:
    """Write the tensors outside the layers to the artifact, part by part."""
    view, artifact = run.view, run.artifact
    changed = plan.model_edit.outside_tensors()
    for number, part in enumerate(view.outside_parts()):
        key = f"outside.{number}"
        if key not in artifact.done:
            view.load_outside(part)
            held = view.outside_tensors(part)
            artifact.write(key, shards[key], held | {n: t for n, t in changed.items() if n in held}, {})
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
    # unless layers leave, nothing is changed: some types count something else as layers (LongCat: two sub-layers each)
    described = shallower(view.config, list(plan.renumbered)) if plan.dropped else view.config
    config: dict[str, Any] = json.loads(described.to_json_string())
    config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config["architectures"] = [type(view.model).__name__]
    if not view.trust_remote_code:
        config.pop("auto_map", None)  # names code that was not run and is not copied
    if modules:
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
    records = [artifact.done[name].record for name in staying_layers(view, plan)]
    record = {
        "versions": {name: version(name) for name in ("lrc", "torch", "transformers", "safetensors")}
        | {"python": platform.python_version()},
        "model": plan.model,
        "recipe": plan.recipe.resolved(),
        "calibration": {"hash": calibration.hash, "provenance": calibration.provenance},
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
    }
    check = functools.partial(
        verify, artifact.folder, hashes=False, config_file=UNCHECKED, trust_remote_code=view.trust_remote_code
    )
    artifact.finish(config, record, model_card(plan, plain="quantization_config" not in config), _beside(view), check)


def _with_owner_renamed(spec: Spec, old: str, new: str) -> Spec:
    """A form's spec with the new path of the module whose factor it shares, where that module is in the renumbered layer."""
    owner = spec.get("owner", "")
    return spec | {"owner": new + owner.removeprefix(old)} if owner.startswith(old + ".") else spec


def shallower(config: Any, layers: Sequence[int]) -> Any:
    """A copy of a configuration that describes a model with these layers only.

    Changes the number of layers, and every list that has one entry per layer (such as the types of attention).

    Args:
        config: a transformers configuration.
        layers: numbers of the original layers that are kept, ascending.
    """
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    before = text.num_hidden_layers
    if len(layers) == before:
        return cut
    for key, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == before:
            setattr(text, key, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    return cut


def _beside(view: ModelView) -> dict[str, bytes]:
    """File name -> content, for the tokenizer, the generation settings and the licence.

    They are copied from the model's folder; for GGUF transformers writes them. The checkpoint's own code is copied if it was
    trusted; otherwise the references to it are removed.
    """
    if not view.location.gguf:
        files = {path.name: path.read_bytes() for path in view.location.files(code=view.trust_remote_code)}
        if not view.trust_remote_code and "tokenizer_config.json" in files:
            held = json.loads(files["tokenizer_config.json"])
            if held.pop("auto_map", None):
                files["tokenizer_config.json"] = (json.dumps(held, indent=2, ensure_ascii=False) + "\n").encode()
        return files
    with tempfile.TemporaryDirectory() as folder:
        view.location.tokenizer().save_pretrained(folder)
        if generation := getattr(view.model, "generation_config", None):
            generation.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Location(folder, Path(folder)).files()}
