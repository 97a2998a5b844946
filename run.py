"""The one loop: layer by layer, weights in, statistics, solve, shard out, activations on.

`execute` asks a method only for solutions and never which method it is; it is given a plan and calibration tokens, and leaves a
finished artifact. What an earlier, killed run finished is not done again: its layers are replayed (forward only), so that the
activations that reach the first unfinished layer are the very same.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .artifact import UNCHECKED, Artifact
from .calibrate.data import Calibration
from .calibrate.stats import LayerCollector
from .calibrate.stream import Call, Lockstep, check_finite, run_layer
from .card import model_card
from .compress import experts
from .compress.base import Method, Settings, TargetStats, get_method
from .compress.forms import Form, Spec, build_module, fill_module, linear_weight
from .errors import NonFiniteError
from .load import FORMAT_VERSION, METHOD
from .model import ModelView, Target, location_files
from .plan import Plan, Step
from .verify import verify


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


def execute(
    plan: Plan,
    view: ModelView,
    calibration: Calibration,
    out: Path,
    *,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    restart: bool = False,
    notify: Callable[[LayerReport], None] = lambda report: None,
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

    Raises:
        LrcError: anything that the user can mend; what is finished stays, and the same call continues.
    """
    _full_precision()
    with Artifact(out, plan.identity(calibration.hash), restart) as artifact, torch.no_grad():
        if artifact.finished:
            return False
        artifact.require_space(plan.whole_after - sum(shard.nbytes for shard in artifact.done.values()))
        names = _shard_names(view)
        _compress_layers(plan, view, calibration, artifact, devices, names, notify)
        for number, part in enumerate(view.outside_parts()):
            key = f"outside.{number}"
            if key not in artifact.done:
                view.load_outside(part)
                artifact.write(key, names[key], view.outside_tensors(part), {})
                view.unload()
                _give_back()
        _finish(plan, view, calibration, artifact)
    return True


def _compress_layers(
    plan: Plan,
    view: ModelView,
    calibration: Calibration,
    artifact: Artifact,
    devices: Sequence[torch.device],
    names: Mapping[str, str],
    notify: Callable[[LayerReport], None],
) -> None:
    total = len(view.layers)
    if all(name in artifact.done for name in view.layer_names):
        return
    method, settings = get_method(plan.recipe.method), plan.recipe.parsed_settings
    sequential = plan.recipe.propagate == "compressed"
    batches = [{"input_ids": ids} for ids in calibration.tokens.split(plan.batch)]
    view.load_outside()
    with Lockstep(view.model, view.layers) as steps:
        steps.start(batches)
        view.unload()
        _give_back()
        for index, name in enumerate(view.layer_names):
            started = time.perf_counter()
            layer = view.load(name)
            last, resumed = index == total - 1, name in artifact.done
            if resumed:
                if sequential:
                    _install(layer, name, artifact.done[name].record["forms"], artifact.read(name))
                records = [TargetRecord(**record) for record in artifact.done[name].record["targets"]]
                outputs = None if last else _run(layer, name, steps.calls, devices)[0]
            else:
                outputs, statistics = _run(layer, name, steps.calls, devices, plan.layer_steps(index), plan.wanted(index))
                forms, records = _solve_layer(plan, layer, name, index, statistics, method, settings, devices[0])
                stored = _stored(layer, name, forms)
                specs = _specs(plan.layer_steps(index), forms)
                artifact.write(name, names[name], stored, {"forms": specs, "targets": [asdict(r) for r in records]})
                if sequential and not last:
                    _install(layer, name, specs, stored)
                    del forms, stored
                    outputs = _run(layer, name, steps.calls, devices)[0]
            view.unload(name)
            _give_back()
            notify(LayerReport(index, total, tuple(records), time.perf_counter() - started, peak_rss(), resumed))
            if not last:
                assert outputs is not None
                steps.answer(outputs)
                del outputs


def _run(
    layer: nn.Module,
    name: str,
    calls: Sequence[Call],
    devices: Sequence[torch.device],
    steps: Sequence[Step] = (),
    what: Any = None,
) -> tuple[list[Any], dict[str, TargetStats]]:
    """Answer every batch's call, and collect statistics where `what` says so; batches are spread over the devices."""
    targets = [step.target for step in steps if not step.choice.dense]
    copies = [layer.to(devices[0])] + [copy.deepcopy(layer).to(device) for device in devices[1:]]
    collectors = (
        [LayerCollector(each, name, targets, what, device) for each, device in zip(copies, devices, strict=True)]
        if what
        else []
    )
    outputs: list[Any] = [None] * len(calls)

    def share(worker: int) -> None:
        with torch.no_grad():
            for batch in range(worker, len(calls), len(devices)):
                output = run_layer(copies[worker], calls[batch].to(devices[worker]))
                check_finite(output, name, batch)
                outputs[batch] = tree_map(lambda x: x.to("cpu") if isinstance(x, Tensor) else x, output)

    for collector in collectors:
        collector.__enter__()
    try:
        if len(devices) == 1:
            share(0)
        else:
            with ThreadPoolExecutor(len(devices)) as pool:
                list(pool.map(share, range(len(devices))))
    finally:
        for collector in collectors:
            collector.__exit__()
    return outputs, collectors[0].result(collectors[1:]) if collectors else {}


def _solve_layer(
    plan: Plan,
    layer: nn.Module,
    name: str,
    index: int,
    statistics: dict[str, TargetStats],
    method: Method,
    settings: Settings,
    device: torch.device,
) -> tuple[dict[str, Form], list[TargetRecord]]:
    forms: dict[str, Form] = {}
    records = []
    for step in plan.layer_steps(index):
        target = step.target
        shape = (target.out_features, target.in_features)
        if step.choice.dense:
            spec = {"kind": "dense"}
            records.append(TargetRecord(target.name, spec, shape, step.bytes_before, step.bytes_after, note=step.why_dense))
            continue
        weight, bias = _weight(layer, name, target)
        stats = statistics.pop(target.name)  # what is solved needs its statistics no longer
        solution = method.solve(weight.to(device), stats, settings)
        form = solution.form(step.choice).with_bias(bias).stored(plan.dtype)
        if not all(torch.isfinite(tensor).all() for tensor in form.tensors().values()):
            raise NonFiniteError(
                f"{target.name}: its factors are not finite in {plan.dtype}.", "Try --dtype bfloat16 or float32."
            )
        forms[target.name] = form
        error = solution.loss(step.choice) / solution.total if solution.total > 0 else 0.0
        tokens = stats.group.tokens
        note = (
            f"only {tokens} calibration tokens for an input of {target.in_features}"
            if method.needs and tokens < target.in_features
            else ""
        )
        records.append(
            TargetRecord(
                target.name,
                form.spec(),
                shape,
                step.bytes_before,
                form.nbytes,
                error,
                tokens if method.needs else None,
                note=note,
            )
        )
    return forms, records


def _weight(layer: nn.Module, name: str, target: Target) -> tuple[Tensor, Tensor | None]:
    module: Any = layer.get_submodule(target.module.removeprefix(name + "."))
    if target.expert is None:
        return linear_weight(module), module.bias
    return experts.expert_weight(module, target.role.rpartition(".")[2], target.expert), None


def _stored(layer: nn.Module, name: str, forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """The layer's tensors as they go to disk: forms in the place of the targets that have one."""
    tensors: dict[str, Tensor] = {}
    fused = {key.rpartition(".")[0] for key in forms}
    for path, tensor in layer.state_dict().items():
        full = f"{name}.{path}"
        module, _, leaf = full.rpartition(".")
        if full in fused:  # an experts parameter: an empty guard under its name, every expert's form beside it
            parent = layer.get_submodule(path.rpartition(".")[0]) if "." in path else layer
            tensors[full] = tensor.new_empty(0)
            for expert in range(len(tensor)):
                form = forms.get(f"{full}.{expert}")
                parts = form.tensors() if form else {"weight": experts.expert_weight(parent, leaf, expert).contiguous()}
                tensors |= {f"{module}.{experts.stored_name(leaf, expert)}.{suffix}": part for suffix, part in parts.items()}
        elif module not in forms:
            tensors[full] = tensor.to("cpu")
        elif leaf == "weight":
            tensors |= {f"{module}.{suffix}": part for suffix, part in forms[module].tensors().items()}
    return tensors


def _specs(steps: Iterable[Step], forms: Mapping[str, Form]) -> dict[str, Spec]:
    """Module path -> spec, as config.json will carry it; the experts of one parameter together."""
    specs: dict[str, Spec] = {}
    for step in steps:
        target, form = step.target, forms.get(step.target.name)
        if target.expert is not None:
            parameter = target.name.rpartition(".")[0]
            entry = specs.setdefault(parameter, {"kind": "experts", "forms": []})
            entry["forms"].append(form.spec() if form else {"kind": "dense", "bias": False})
        elif form:
            specs[target.name] = form.spec()
    return {
        name: spec
        for name, spec in specs.items()
        if spec["kind"] != "experts" or any(f["kind"] != "dense" for f in spec["forms"])
    }


def _install(layer: nn.Module, name: str, specs: Mapping[str, Spec], tensors: Mapping[str, Tensor]) -> None:
    """Put the stored forms into the layer, so that activations can go through the compressed layer."""

    def module_for(spec: Spec, path: str, shape: tuple[int, int]) -> nn.Module:
        prefix = path + "."
        parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        with torch.device("meta"):
            empty = build_module(spec, shape[1], shape[0])
        return fill_module(empty, parts)

    for full, spec in specs.items():
        path = full.removeprefix(name + ".")
        parent_path, _, leaf = path.rpartition(".")
        parent = layer.get_submodule(parent_path) if parent_path else layer
        if spec["kind"] == "experts":
            shape = experts.expert_parameters(parent)[leaf][1:]
            modules = [
                module_for(form, f"{full.rpartition('.')[0]}.{experts.stored_name(leaf, expert)}", shape)
                for expert, form in enumerate(spec["forms"])
            ]
            experts.install(parent, leaf, modules)
        else:
            weight = linear_weight(getattr(parent, leaf))
            setattr(parent, leaf, module_for(spec, full, (weight.shape[0], weight.shape[1])))


def _shard_names(view: ModelView) -> dict[str, str]:
    keys = [*view.layer_names, *(f"outside.{number}" for number in range(len(view.outside_parts())))]
    return {key: f"model-{number:05d}-of-{len(keys):05d}.safetensors" for number, key in enumerate(keys, 1)}


def _finish(plan: Plan, view: ModelView, calibration: Calibration, artifact: Artifact) -> None:
    records = [artifact.done[name].record for name in view.layer_names]
    modules = {module: spec for record in records for module, spec in record["forms"].items()}
    config = json.loads(view.config.to_json_string())
    config["dtype"] = str(plan.dtype).removeprefix("torch.")
    config["architectures"] = [type(view.model).__name__]
    if modules:
        config["quantization_config"] = {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "lrc_version": version("lrc"),
            "modules": modules,
        }
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
        "ratio_of_whole_model": plan.whole_ratio,
        "targets": [target for entry in records for target in entry["targets"]],
        "kept": [asdict(kept) for kept in plan.kept],
    }
    check = functools.partial(verify, artifact.folder, hashes=False, config_file=UNCHECKED)
    artifact.finish(config, record, model_card(plan), _beside(view), check)


def _beside(view: ModelView) -> dict[str, bytes]:
    """Tokenizer, generation settings and licence: copied from a folder, written by transformers for GGUF."""
    if not view.location.gguf:
        return {path.name: path.read_bytes() for path in location_files(view.location.path)}
    with tempfile.TemporaryDirectory() as folder:
        view.location.tokenizer().save_pretrained(folder)
        if generation := getattr(view.model, "generation_config", None):
            generation.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in location_files(Path(folder))}


def peak_rss() -> int:
    """The largest resident memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what was freed, and the peak would grow from layer to layer."""
    with contextlib.suppress(AttributeError, OSError):  # another C library has no malloc_trim and no such habit
        ctypes.CDLL(None).malloc_trim(0)


def _full_precision() -> None:
    """Grams in float32 mean float32: TensorFloat-32 keeps 10 bits of mantissa."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
