"""The steps of a run: what is measured before it, the layers, what lies outside them, a refinement of the whole, the end.

`execute` asks a method only for solutions and never which method it is; it is given a plan and calibration tokens, and leaves a
finished artifact. What an earlier, killed run finished is not done again.
"""

from __future__ import annotations

import copy
import functools
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..calibrate.collect import Statistics, backward_needs, collect, collect_backward
from ..calibrate.data import Calibration
from ..calibrate.gradients import GradientSettings, backward_passes
from ..calibrate.store import TRIALS
from ..checkpoint.artifact import UNCHECKED, Artifact
from ..checkpoint.hf_quantizer import FORMAT_VERSION, METHOD
from ..checkpoint.location import Location
from ..compress.base import BACKWARD_NEEDS, FORWARD_NEEDS
from ..compress.forms.base import Spec
from ..errors import BudgetError
from ..model.host_memory import give_back, steady_memory
from ..model.precision import full_precision
from ..model.view import ModelView
from ..plan.plan import Plan
from ..plan.planner import make_plan
from ..refine.end_to_end import Distillation, refine_artifact
from ..refine.trainer import Windows
from .depth_stage import operated
from .layer_loop import LayerLoop, LayerReport, renamed, staying_layers
from .loss_curves import measure
from .model_card import model_card
from .plain_export import as_plain
from .verify import verify

SURVEY = ".lrc-statistics"  # beside the artifact until it is finished
SEARCHED = ".lrc-search"  # trials of a search for a size, beside the artifact until it is finished
DISTILLATION = "distillation"  # inside it


@full_precision
def prepare(
    plan: Plan,
    view: ModelView,
    calibration: Calibration,
    out: Path,
    *,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    statistics: Path | None = None,
    restart: bool = False,
    notify: Callable[[str, int, float], None] = lambda what, layer, seconds: None,
) -> tuple[Plan, Statistics | None]:
    """Where the budget looks at losses, collect statistics, measure them, and make the plan anew.

    Args:
        plan: from `make_plan`, with the budget shared out evenly.
        statistics: folder to keep statistics in for other recipes; None keeps them beside the artifact until it is finished.
        notify: called with (what was done, layers finished, seconds of this one).

    Returns:
        The final plan, and the statistics that `execute` can work from (None where it has to collect its own).
    """
    recipe = plan.recipe
    if recipe.max_ppl_increase is not None and plan.found is None and not _finished(plan, calibration, out):
        raise BudgetError(
            "A size for max_ppl_increase is searched by lrc compress alone.", "Say --ratio, --bits or --size here."
        )
    if recipe.dropping is not None:
        folder = out / SURVEY
        model_edit = operated(plan, view, calibration, out, folder, (statistics or folder) / TRIALS, devices, restart, notify)
        return (
            plan if model_edit is None else make_plan(view, recipe, len(devices), model_edit=model_edit, found=plan.found)
        ), None
    method = recipe.compression[0]
    looks_around = method.joint is not None and method.joint.across_layers
    streamed = recipe.allocation == "uniform" and not looks_around and not method.all_needs & BACKWARD_NEEDS
    if streamed and (statistics is None or not recipe.reads_text):
        return plan, None
    with Artifact(out, plan.identity(calibration.hash), restart) as artifact:  # refuses another run before hours of work
        if artifact.finished:
            return plan, None
        if restart:
            shutil.rmtree(out / SURVEY, ignore_errors=True)
    folder = statistics if statistics and recipe.reads_text else out / SURVEY  # a shared folder is of one calibration
    store = collect(view, calibration, plan.needs, folder, devices, recipe.gradients, notify)
    if recipe.allocation != "uniform":
        keep = frozenset(step.target.name for step in plan.steps if step.kept)
        curves = measure(
            view, recipe, store, keep, calibration, devices[0],
            lambda layer, seconds: notify("losses", layer, seconds),
        )  # fmt: skip
        plan = make_plan(view, recipe, len(devices), curves, found=plan.found)
    return plan, store


def _finished(plan: Plan, calibration: Calibration, out: Path) -> bool:
    with Artifact(out, plan.identity(calibration.hash), False) as artifact:
        return artifact.finished


@full_precision
def shared_statistics(
    plans: Sequence[Plan], view: ModelView, calibration: Calibration, folder: Path, devices: Sequence[torch.device]
) -> None:
    """Collect what all of these plans need of the original model, so that each can `prepare` from the same folder."""
    names = dict.fromkeys(name for plan in plans for name in plan.needs)
    needs = {name: frozenset[str]().union(*(plan.needs.get(name, ()) for plan in plans)) & FORWARD_NEEDS for name in names}
    collect(view, calibration, needs, folder, devices, GradientSettings())
    passes = backward_passes((plan.recipe.gradients, backward_needs(plan.needs)) for plan in plans)
    for settings, back in passes.items():
        collect_backward(view, calibration, back, folder, devices, settings)


@full_precision
def execute(
    plan: Plan,
    view: ModelView,
    calibration: Calibration,
    out: Path,
    *,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    restart: bool = False,
    notify: Callable[[LayerReport], None] = lambda report: None,
    refined: Callable[[int, int, float], None] = lambda look, looks, loss: None,
    statistics: Statistics | None = None,
) -> bool:
    """Carry out a plan; returns False if the folder held the finished result already.

    Args:
        plan: from `make_plan(view, recipe)`.
        view: the model; its weights come and go.
        calibration: tokens (samples, length).
        out: the output folder; see `Artifact` for what it may hold.
        devices: where layers run; with several, the batches of each layer are spread over them.
        restart: delete an earlier run in `out`.
        notify: called after each layer.
        refined: called after each look of an end-to-end refinement with (look, of how many at most, held-out loss).
        statistics: of the original model, where they were collected before; then no activation flows here, unless statistics
            are to come from the part already compressed.

    Raises:
        LrcError: anything that the user can mend; what is finished stays, and the same call continues.
    """
    steady_memory()
    with Artifact(out, plan.identity(calibration.hash), restart) as artifact, torch.no_grad():
        if artifact.finished:
            return False
        if restart:
            shutil.rmtree(out / SURVEY / DISTILLATION, ignore_errors=True)
        artifact.require_space(plan.whole_after - sum(shard.nbytes for shard in artifact.done.values()))
        shards = _shard_names(view, plan)
        LayerLoop(plan, view, calibration, artifact, shards, devices, statistics, notify).run()
        _write_outside(plan, view, artifact, shards)
        config = _config(plan, view, artifact)
        refinement = _refine_whole(plan, view, calibration, artifact, config, devices, refined)
        config = as_plain(config, type(view.config), type(view.model))
        _finish(plan, view, calibration, artifact, config, refinement)
    for leftover in (SURVEY, SEARCHED):
        shutil.rmtree(out / leftover, ignore_errors=True)
    return True


def _shard_names(view: ModelView, plan: Plan) -> dict[str, str]:
    keys = [*staying_layers(view, plan), *(f"outside.{number}" for number in range(len(view.outside_parts())))]
    return {key: f"model-{number:05d}-of-{len(keys):05d}.safetensors" for number, key in enumerate(keys, 1)}


def _write_outside(plan: Plan, view: ModelView, artifact: Artifact, shards: Mapping[str, str]) -> None:
    """Leave what lies outside the layers in the artifact, part by part."""
    changed = plan.model_edit.outside_tensors()
    for number, part in enumerate(view.outside_parts()):
        key = f"outside.{number}"
        if key not in artifact.done:
            view.load_outside(part)
            held = view.outside_tensors(part)
            artifact.write(key, shards[key], held | {n: t for n, t in changed.items() if n in held}, {})
            view.unload()
            give_back()


def _refine_whole(
    plan: Plan,
    view: ModelView,
    calibration: Calibration,
    artifact: Artifact,
    config: Mapping[str, Any],
    devices: Sequence[torch.device],
    notify: Callable[[int, int, float], None],
) -> dict[str, Any] | None:
    """Refine what the artifact holds from end to end where the recipe asks for it; the record that lrc.json keeps."""
    settings = None if plan.recipe.refine is None else plan.recipe.refine.end_to_end
    if settings is None:
        return None
    original = ModelView(view.location, view.dtype, view.trust_remote_code)  # `view` may hold forms by now
    windows = Windows(calibration.tokens, calibration.held_out)
    work = Distillation(artifact.folder / SURVEY / DISTILLATION, settings, windows)
    return refine_artifact(artifact, config, original, work, devices, notify)


def _config(plan: Plan, view: ModelView, artifact: Artifact) -> dict[str, Any]:
    """What config.json will hold."""
    staying = staying_layers(view, plan)
    modules: dict[str, Any] = {}
    for name in staying:
        record = artifact.done[name].record
        specs = {path: _with_owner_renamed(spec, name, staying[name]) for path, spec in record["forms"].items()}
        modules |= renamed(specs | record["edits"], name, staying[name])
    config: dict[str, Any] = json.loads(shallower(view.config, list(plan.renumbered)).to_json_string())
    config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config["architectures"] = [type(view.model).__name__]
    if not view.trust_remote_code:
        config.pop("auto_map", None)  # the code that it names was not run, and is not copied
    if modules:
        config["quantization_config"] = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "lrc_version": version("lrc"),
            "modules": modules,
        }
    return config


def _finish(
    plan: Plan,
    view: ModelView,
    calibration: Calibration,
    artifact: Artifact,
    config: Mapping[str, Any],
    refinement: dict[str, Any] | None,
) -> None:
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
    """A form's spec; the module whose factor it shares has moved with its layer."""
    owner = spec.get("owner", "")
    return spec | {"owner": new + owner.removeprefix(old)} if owner.startswith(old + ".") else spec


def shallower(config: Any, layers: Sequence[int]) -> Any:
    """The configuration of the same architecture with only these of its layers.

    The count goes, and with it every list that has one entry per layer (kinds of attention, of feed-forward).
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
    """Tokenizer, generation settings and licence: copied from a folder, written by transformers for GGUF.

    The checkpoint's own code comes along where it was trusted, and what points to it goes where it was not.
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
