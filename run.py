"""The one loop: layer by layer, weights in, statistics, solve, shard out, activations on.

`execute` asks a method only for solutions and never which method it is; it is given a plan and calibration tokens, and leaves a
finished artifact. What an earlier, killed run finished is not done again: its layers are replayed (forward only), so that the
activations that reach the first unfinished layer are the very same.
"""

from __future__ import annotations

import copy
import functools
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .artifact import UNCHECKED, Artifact
from .assemble import form_specs, install, stored_tensors, target_weight
from .calibrate.data import Calibration
from .calibrate.stream import Call, hidden_of
from .card import model_card
from .compress.absent import ZERO, Guarded
from .compress.base import BACKWARD_NEEDS, NOTHING_SEEN, TargetStats
from .compress.forms import Form, Spec
from .distill import refine_artifact
from .edit import NONE, edited
from .errors import BudgetError
from .load import FORMAT_VERSION, METHOD
from .locate import Location
from .model import ModelView
from .operate import operated
from .passes import full_precision, give_back, peak_rss, run_batches, steady_memory, through_layers
from .plan import Plan, make_plan
from .refine import refine_block
from .solving import SolvedTarget, solved_forms
from .streams import Pair, Solved, correct, restored
from .survey import Statistics, collect, measure
from .verify import verify

SURVEY = ".lrc-statistics"  # beside the artifact until it is finished
SEARCHED = ".lrc-search"  # trials of a search for a size, beside the artifact until it is finished
DISTILLATION = "distillation"  # inside it


@dataclass(frozen=True)
class TargetRecord:
    """What became of one target; kept in lrc.json.

    Args:
        error: the loss in the method's own metric, relative to dropping the target altogether.
        tokens: how many tokens its statistics are over.
        damping: the ridge that was added to a gram, relative to its mean diagonal.
        note: anything a reader should know.
    """

    name: str
    form: Spec
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    error: float | None = None
    tokens: int | None = None
    damping: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class LayerReport:
    """One finished layer, for whoever watches."""

    index: int
    layers: int
    records: tuple[TargetRecord, ...]
    seconds: float
    peak_bytes: int
    resumed: bool = False


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
        surgery = operated(plan, view, calibration, out, SURVEY, devices, restart, notify)
        return (plan if surgery is None else make_plan(view, recipe, len(devices), surgery=surgery, found=plan.found)), None
    method = recipe.compression[0]
    needs, looks_around = method.all_needs, method.joint is not None and method.joint.across_layers
    streamed = recipe.allocation == "uniform" and not looks_around and not needs & BACKWARD_NEEDS
    if streamed and (statistics is None or not recipe.reads_text):
        return plan, None
    with Artifact(out, plan.identity(calibration.hash), restart) as artifact:  # refuses another run before hours of work
        if artifact.finished:
            return plan, None
        if restart:
            shutil.rmtree(out / SURVEY, ignore_errors=True)
    folder = statistics if statistics and recipe.reads_text else out / SURVEY  # a shared folder is of one calibration
    store = collect(view, calibration, needs, folder, devices, recipe.gradients, notify)
    if recipe.allocation != "uniform":
        keep = frozenset(step.target.name for step in plan.steps if step.kept)
        curves = measure(
            view, recipe, store, keep, calibration.tokens, devices[0],
            lambda layer, seconds: notify("losses", layer, seconds),
        )  # fmt: skip
        plan = make_plan(view, recipe, len(devices), curves, found=plan.found)
    return plan, store


def _finished(plan: Plan, calibration: Calibration, out: Path) -> bool:
    with Artifact(out, plan.identity(calibration.hash), False) as artifact:
        return artifact.finished


def shared_statistics(
    plans: Sequence[Plan], view: ModelView, calibration: Calibration, folder: Path, devices: Sequence[torch.device]
) -> Statistics:
    """Collect what all of these plans need of the original model, so that each can `prepare` from the same folder."""
    needs = frozenset[str]().union(*(plan.recipe.compression[0].all_needs for plan in plans))
    return collect(view, calibration, needs, folder, devices, plans[0].recipe.gradients)


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
    full_precision()
    steady_memory()
    with Artifact(out, plan.identity(calibration.hash), restart) as artifact, torch.no_grad():
        if artifact.finished:
            return False
        if restart:
            shutil.rmtree(out / SURVEY / DISTILLATION, ignore_errors=True)
        artifact.require_space(plan.whole_after - sum(shard.nbytes for shard in artifact.done.values()))
        names = _shard_names(view, plan)
        _compress_layers(plan, view, calibration, artifact, devices, names, notify, statistics)
        changed = plan.surgery.outside_tensors()
        for number, part in enumerate(view.outside_parts()):
            key = f"outside.{number}"
            if key not in artifact.done:
                view.load_outside(part)
                held = view.outside_tensors(part)
                artifact.write(key, names[key], held | {n: t for n, t in changed.items() if n in held}, {})
                view.unload()
                give_back()
        config, refinement = _config(plan, view, artifact), None
        if plan.recipe.refine is not None and plan.recipe.refine.end_to_end is not None:
            original = ModelView(view.location, view.dtype, view.trust_remote_code)  # `view` may hold forms by now
            refinement = refine_artifact(
                artifact,
                config,
                original,
                out / SURVEY / DISTILLATION,
                plan.recipe.refine.end_to_end,
                calibration.tokens,
                calibration.held_out,
                devices,
                refined,
            )
        _finish(plan, view, calibration, artifact, config, refinement)
    for leftover in (SURVEY, SEARCHED):
        shutil.rmtree(out / leftover, ignore_errors=True)
    return True


def _compress_layers(
    plan: Plan,
    view: ModelView,
    calibration: Calibration,
    artifact: Artifact,
    devices: Sequence[torch.device],
    names: Mapping[str, str],
    notify: Callable[[LayerReport], None],
    statistics: Statistics | None,
) -> None:
    total = len(view.layers)
    staying = _staying(view, plan)
    if all(name in artifact.done for name in staying):
        return
    sequential = plan.recipe.propagate == "compressed"
    device = devices[0]
    waiting: dict[str, SolvedTarget] = {}  # of sets across layers, until their layer comes

    def compress(index: int, name: str, layer: nn.Module, stats: dict[str, TargetStats]) -> Solved:
        forms, records = _solve_layer(plan, view, layer, index, stats, statistics, waiting, device)
        edits = plan.surgery.edit(name) or NONE
        if edits.maps and not forms and not edits.zeroed:
            forms = _guard(plan, layer, name, index)
        specs = form_specs(plan.layer_steps(index), forms)
        record = {"forms": specs, "edits": edits.specs(name), "targets": [asdict(each) for each in records]}
        return specs, stored_tensors(layer, name, forms), record

    def write(name: str, stored: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        artifact.write(name, names[name], _renamed(stored, name, staying[name]), record)

    def finish(index: int, name: str, layer: nn.Module, stats: dict[str, TargetStats]) -> Solved:
        solved = compress(index, name, layer, stats)
        write(name, *solved[1:])
        return solved

    def put_back(layer: nn.Module, name: str) -> None:
        """The forms of a finished layer."""
        held = _renamed(artifact.read(name), staying[name], name)
        install(layer, name, artifact.done[name].record["forms"], held)
        restored(layer, name, held)

    def report(index: int, name: str, started: float, resumed: bool) -> None:
        records = tuple(TargetRecord(**record) for record in artifact.done[name].record["targets"])
        notify(LayerReport(index, total, records, time.perf_counter() - started, peak_rss(), resumed))

    def visit(index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any] | None:
        """Compress a layer, or answer for one that is finished."""
        started = time.perf_counter()
        last, resumed = index == total - 1, name in artifact.done
        outputs: list[Any] | None = None
        if resumed:
            if sequential:
                put_back(layer, name)
            outputs = None if last else run_batches(layer, name, calls, devices)[0]
        else:
            outputs, stats = run_batches(layer, name, calls, devices, plan.solved(index), plan.wanted(index))
            if statistics is not None:
                stats = statistics.with_gradients(name, stats)
            specs, stored, _ = finish(index, name, layer, stats)
            if sequential and not last:
                install(layer, name, specs, stored)
                del stored
                outputs = run_batches(layer, name, calls, devices)[0]
        report(index, name, started, resumed)
        return outputs

    def visit_both(index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any]:
        """The same with the original's activations beside those of the compressed model."""
        started, pair = time.perf_counter(), Pair.of(calls, held)
        resumed = name in artifact.done
        if resumed:
            goals, small = run_batches(layer, name, pair.original, devices)[0], copy.deepcopy(layer)
            put_back(small, name)
        else:
            seen, unseen = pair.read(sequential)
            outputs, stats = run_batches(layer, name, seen, devices, plan.solved(index), plan.wanted(index))
            others = run_batches(layer, name, unseen, devices)[0]
            goals = others if sequential else outputs + others
            if statistics is not None:
                stats = statistics.with_gradients(name, stats)

            def in_place(tried: nn.Module) -> Solved:
                solved = compress(index, name, tried, dict(stats))
                install(tried, name, *solved[:2])
                return solved

            targets = [step.target for step in plan.layer_steps(index)]
            wanted_states = [hidden_of(goal) for goal in goals]
            small, (_, stored, record) = correct(
                layer, name, targets, pair, wanted_states, plan.recipe.correction, in_place, device
            )  # fmt: skip
            if block is not None:
                done = refine_block(small, *pair.split(wanted_states), block)
                trained = {f"{name}.{key}": value for key, value in small.state_dict().items()}
                stored = {key: trained.get(key, value).to("cpu") for key, value in stored.items()}
                record |= {"refinement": {key: value for key, value in asdict(done).items() if key != "seconds"}}
            write(name, stored, record)
        report(index, name, started, resumed)
        return goals if index == total - 1 else goals + run_batches(small, name, pair.compressed, devices)[0]

    refine = plan.recipe.refine
    block = None if refine is None else refine.block
    if block is not None or plan.recipe.correction is not None:
        apart = calibration.held_out.split(plan.batch)
        held = len(apart)
        through_layers(view, [*calibration.tokens.split(plan.batch), *apart] * 2, visit_both, plan.dropped, plan.surgery.edit)
        return
    idle = plan.recipe.depth is not None and not any(plan.solved(index) for index in range(total))
    if plan.recipe.reads_text and not idle and (statistics is None or sequential):
        through_layers(view, calibration.tokens.split(plan.batch), visit, plan.dropped, plan.surgery.edit)
        return
    for index, name in enumerate(view.layer_names):
        if name not in staying:
            continue
        started = time.perf_counter()
        resumed = name in artifact.done
        if not resumed:
            names_here = [target.name for target in plan.solved(index) if target.name not in waiting]
            stats = statistics.read(name, names_here) if statistics else dict.fromkeys(names_here, NOTHING_SEEN)
            with edited(view.load(name), name, plan.surgery.edit(name)) as layer:
                finish(index, name, layer, stats)
            view.unload(name)
            give_back()
        report(index, name, started, resumed)


def _solve_layer(
    plan: Plan,
    view: ModelView,
    layer: nn.Module,
    index: int,
    statistics: dict[str, TargetStats],
    stored: Statistics | None,
    solved: dict[str, SolvedTarget],
    device: torch.device,
) -> tuple[dict[str, Form], list[TargetRecord]]:
    """Forms and records of a layer's targets.

    Args:
        statistics: of this layer's targets; used up.
        stored: of all layers, for sets across them.
        solved: what earlier layers found for members of their sets in this one; what is found here for later ones is added.
    """
    method = plan.recipe.compression[0]
    forms: dict[str, Form] = {}
    records = []
    items = {target.name: item for item in plan.items for target in item.targets}
    for step in plan.layer_steps(index):
        target = step.target
        shape = (target.out_features, target.in_features)
        if step.choice.dense:
            spec = {"kind": "dense" if step.bytes_after else ZERO}
            records.append(TargetRecord(target.name, spec, shape, step.bytes_before, step.bytes_after, note=step.why_dense))
            continue
        if target.name not in solved:
            read = None if stored is None else stored.read
            solved |= solved_forms(plan, view, items[target.name], layer, index, statistics, read, device)
        found = solved.pop(target.name)
        forms[target.name] = found.form
        notes = [found.note] if found.note else []
        if method.needs and found.tokens < target.in_features:
            notes.append(f"only {found.tokens} calibration tokens for an input of {target.in_features}")
        records.append(
            TargetRecord(
                target.name,
                found.form.spec(),
                shape,
                step.bytes_before,
                step.bytes_after,
                found.error,
                found.tokens if method.needs else None,
                found.damping,
                "; ".join(notes),
            )
        )
    return forms, records


def _guard(plan: Plan, layer: nn.Module, name: str, index: int) -> dict[str, Form]:
    """One matrix under another name, so that a reader without lrc does not run the layer without its maps."""
    target = next(step.target for step in plan.layer_steps(index) if step.target.expert is None)
    weight, bias = target_weight(layer, name, target)
    return {target.name: Guarded(weight, bias).stored(plan.dtype)}


def _staying(view: ModelView, plan: Plan) -> dict[str, str]:
    """Layer of the original -> its name in the result."""
    return {view.layer_names[old]: view.layer_names[new] for old, new in plan.renumbered.items()}


def _shard_names(view: ModelView, plan: Plan) -> dict[str, str]:
    keys = [*_staying(view, plan), *(f"outside.{number}" for number in range(len(view.outside_parts())))]
    return {key: f"model-{number:05d}-of-{len(keys):05d}.safetensors" for number, key in enumerate(keys, 1)}


def _config(plan: Plan, view: ModelView, artifact: Artifact) -> dict[str, Any]:
    """What config.json will hold."""
    staying = _staying(view, plan)
    modules: dict[str, Any] = {}
    for name in staying:
        record = artifact.done[name].record
        specs = {path: _with_owner_renamed(spec, name, staying[name]) for path, spec in record["forms"].items()}
        modules |= _renamed(specs | record["edits"], name, staying[name])
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
    records = [artifact.done[name].record for name in _staying(view, plan)]
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
            for name, entry in zip(_staying(view, plan).values(), records, strict=True)
        },
        "dropped_layers": list(plan.dropped),
        "refinement": refinement,
        "depth": {"removed": list(plan.surgery.removed), **plan.surgery.record},
        "kept": [asdict(kept) for kept in plan.kept],
        "left_out": [asdict(kept) for kept in plan.left_out],
    }
    check = functools.partial(
        verify, artifact.folder, hashes=False, config_file=UNCHECKED, trust_remote_code=view.trust_remote_code
    )
    artifact.finish(config, record, model_card(plan), _beside(view), check)


def _renamed(named: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """The same values with one layer's prefix exchanged for another's."""
    return {new + key.removeprefix(old) if f"{key}.".startswith(old + ".") else key: value for key, value in named.items()}


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
