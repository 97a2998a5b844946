"""The real pipeline in one call, for tests: checkpoint on disk in, artifact on disk out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.compress.forms.base import linear_weight
from lrc.plan.load_recipe import load_recipe
from lrc.plan.plan import Plan
from lrc.run.pipeline import run_request
from lrc.run.request import Request

IDS = torch.arange(3, 40)[None]


def compress(
    model: Path,
    out: Path,
    text: Path,
    recipe: str = "svd-llm",
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    dtype: torch.dtype | None = None,
    samples: int = 8,
    length: int = 48,
    **overrides: Any,
) -> Plan:
    """Compress `model` into `out`, calibrated on a text file; returns the plan that was carried out."""
    wanted = {
        "calibration.source": f"text:{text}",
        "calibration.samples": samples,
        "calibration.length": length,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    request = Request(locate(str(model)), load_recipe(recipe, wanted), tuple(devices), dtype)
    plan = run_request(request, out).plan
    assert plan is not None, "the folder held this result already"
    return plan


def logits(folder: Path, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What a checkpoint answers to `IDS`."""
    model, _ = open_model(str(folder), dtype=dtype)
    with torch.no_grad():
        return model(IDS).logits


def stored(folder: Path, inside: str = "") -> dict[str, torch.Tensor]:
    """Name -> tensor in the weight files of a checkpoint, of those whose names begin so."""
    held = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    return {name: tensor for name, tensor in held.items() if name.startswith(inside)}


def place_of(original: Any, name: str) -> tuple[str, torch.Tensor]:
    """Of a target in a record: what its stored tensors' names begin with, and its weight (out, in) in the original model."""
    path, _, last = name.rpartition(".")
    if last.isdigit():
        return f"{path}_forms.{last}", original.get_parameter(path)[int(last)]
    return name, linear_weight(original.get_submodule(name))


def compressed_once(
    table: Mapping[str, tuple[str, str, Mapping[str, Any], Mapping[str, Any]]],
    checkpoint: Callable[..., Path],
    text: Path,
    folders: Any,
    folder: str = "out",
) -> Callable[[str], Path]:
    """A function name -> folder of a finished result, which is compressed when it is first asked for.

    Args:
        table: name -> family, recipe, settings of the recipe, changes of the family's configuration.
        checkpoint: the fixture `tiny_checkpoints`.
        folders: the fixture `tmp_path_factory`.
        folder: the name of a result's folder.
    """
    done: dict[str, Path] = {}

    def result(name: str) -> Path:
        if name not in done:
            family, recipe, settings, changes = table[name]
            done[name] = folders.mktemp("result") / folder
            compress(checkpoint(family, **changes), done[name], text, recipe, **settings)
        return done[name]

    return result
