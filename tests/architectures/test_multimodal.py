"""Multimodal checkpoints: the text model inside is compressed, everything else is stored as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commandline import lrc_ok
from pipeline import IDS

from lrc.checkpoint.location import locate
from lrc.model.view import ModelView

from .survey import NEAR, NEAREST, READING, STEPS, changed_tensors, write_checkpoint

QUICK = ["qwen2_vl", "llama4"]
OTHERS = ["aria", "gemma3", "idefics3", "internvl", "llava", "mistral3", "phi4_multimodal", "qwen2_5_vl", "qwen3_vl", "smolvlm"]
Written = Callable[[str], tuple[Path, Any]]

families = pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Family -> (a tiny checkpoint of its whole model, that model)."""
    made: dict[str, tuple[Path, Any]] = {}

    def write(family: str) -> tuple[Path, Any]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, write_checkpoint(family, folder, whole=True)
        return made[family]

    return write


def opened(out: Path) -> Any:
    """The result, by the class that its config.json names."""
    name = json.loads((out / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(out).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@families
def test_only_the_text_model_changes(family: str, written: Written, tmp_path: Path) -> None:
    folder, source = written(family)
    lrc_ok("compress", folder, *STEPS[NEAREST], "--out", tmp_path)

    result = opened(tmp_path)
    assert type(result) is type(source)
    forms = tuple(result.config.quantization_config.modules)
    assert forms
    assert changed_tensors(source, result) == []
    text = ModelView(locate(str(folder))).layers_path
    assert all(form.startswith(text + ".") for form in forms)
    found, wanted = logits(result), logits(source)
    assert float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median()) < NEAR


@families
def test_calibration_and_evaluation_take_text_alone(
    family: str, written: Written, tiny_text_file: Path, tmp_path: Path
) -> None:
    folder, _ = written(family)
    lrc_ok("compress", folder, "--recipe", "svd-llm", "--ratio", 0.3, "--calibration", f"text:{tiny_text_file}", *READING,
           "--out", tmp_path)  # fmt: skip
    lrc_ok("verify", tmp_path)
    assert torch.isfinite(logits(opened(tmp_path))).all()
    lrc_ok("eval", tmp_path, "--tasks", f"text:{tiny_text_file}", "--length", 32, "--max-windows", 2,
           "--allow-calibration-text")  # fmt: skip


def test_layers_leave_the_nested_configuration(written: Written, tiny_text_file: Path, tmp_path: Path) -> None:
    folder, source = written("qwen2_vl")
    text = f"text:{tiny_text_file}"
    lrc_ok("compress", folder, *STEPS["block-influence"], "--calibration", text, *READING, "--out", tmp_path)
    result = opened(tmp_path)
    before, after = source.config.get_text_config(), result.config.get_text_config()
    assert after.num_hidden_layers == before.num_hidden_layers - 1 == len(result.model.language_model.layers)
    assert len(result.model.visual.blocks) == len(source.model.visual.blocks)
    assert torch.isfinite(logits(result)).all()


def test_bytes_of_the_whole_count_what_stays(written: Written) -> None:
    folder, source = written("qwen2_vl")
    view = ModelView(locate(str(folder)))
    assert view.numel == sum(parameter.numel() for parameter in source.parameters())
    assert {kept.reason for kept in view.kept if ".visual." in kept.name} <= {
        "outside the decoder layers", "norm, bias or other vector", "embedding or output head",
    }  # fmt: skip
