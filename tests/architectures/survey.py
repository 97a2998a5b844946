"""What lrc does with one type of model: a tiny random checkpoint goes through plan, compress, verify and from_pretrained."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from commandline import run_lrc
from safetensors.torch import save_file
from tiny import tiny_text, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from .tiny_configs import tiny_config

IDS = torch.arange(3, 40)[None]
# name of the step -> arguments; the first one loses almost nothing
STEPS: dict[str, list[str]] = {
    "rtn at 8 bits": ["--recipe", "rtn", "--set", "settings.bits=8", "--set", "settings.group_size=16"],
    "svd-llm": ["--recipe", "svd-llm", "--ratio", "0.3"],
    "gptq": ["--recipe", "gptq", "--set", "settings.group_size=16"],
    "block-influence": ["--recipe", "block-influence", "--set", "depth.drop=1"],
}
READING = ["--samples", "8", "--length", "48"]
NEAR = 0.1  # relative error of the logits at 8 bits, median over the tokens


@dataclass
class Outcome:
    """What happened with one type.

    Args:
        steps: step -> 'works', 'refused: REASON' (at plan time) or 'fails: REASON'.
        buildable: whether transformers builds the type's causal language model from its configuration.
    """

    model_type: str
    steps: dict[str, str] = field(default_factory=dict)
    buildable: bool = True
    note: str = ""


def types() -> list[str]:
    """Every type that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(config: Any, auto: Any = AutoModelForCausalLM) -> Any:
    """A model with random weights. Vectors, experts and stored buffers are random too, so that losing one is noticed."""
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    stored = model.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif parameter.ndim >= 2 and not torch.isfinite(parameter).all():
                parameter.normal_(std=0.08)
            elif parameter.ndim == 3 and float(parameter.std()) < 1e-3 or float(parameter.abs().max()) == 0:
                parameter.normal_(std=0.08)
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer) * 0.1)
    return model.eval()


def write_checkpoint(model_type: str, folder: Path, whole: bool = False) -> Any:
    """Write a tiny checkpoint of a type with a tokenizer; returns its model, or why transformers does not build one.

    Args:
        whole: of a type that has both, the model with its other modalities rather than its text model alone.
    """
    config = tiny_config(model_type)
    tiny_tokenizer().save_pretrained(folder)
    try:
        causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not whole
        model = tiny_model(config, AutoModelForCausalLM if causal else AutoModelForMultimodalLM)
    except Exception as error:
        config.save_pretrained(folder)
        save_file({"model.weight": torch.zeros(2, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
        return f"{type(error).__name__}: {error}"
    model.save_pretrained(folder)
    return model


def look_at(model_type: str, folder: Path, steps: dict[str, list[str]] = STEPS) -> Outcome:
    """Take a tiny checkpoint of a type through every step.

    Args:
        folder: for the checkpoint and the results.
    """
    outcome = Outcome(model_type)
    text = folder / "text.txt"
    text.write_text(tiny_text(1500))
    source = write_checkpoint(model_type, folder / "model")
    if isinstance(source, str):
        outcome.buildable, outcome.note = False, source
    for step, arguments in steps.items():
        asked = [str(folder / "model"), *arguments]
        if step != "rtn at 8 bits":
            asked += ["--calibration", f"text:{text}", *READING]
        try:
            outcome.steps[step] = _step(source, asked, folder / step.replace(" ", "-"), near=step == "rtn at 8 bits")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            file = os.sep.join(Path(where.filename).parts[-2:])
            outcome.steps[step] = f"traceback: {type(error).__name__}: {str(error)[:160]} ({file}:{where.lineno})"
    return outcome


def _step(source: Any, asked: list[str], out: Path, near: bool) -> str:
    done = run_lrc("compress", *asked, "--out", out)
    if done.code:
        planned = run_lrc("plan", *asked)
        return "refused: " + _said(planned.err) if planned.code else "fails: " + _said(done.err)
    if near and (checked := run_lrc("verify", out)).code:  # compress has checked every result, but for its hashes
        return "fails verify: " + _said(checked.err)
    result = type(source).from_pretrained(out).eval()
    if lost := _lost(source, result):
        return f"fails: {lost}"
    with torch.no_grad():
        found = result(IDS, use_cache=False).logits
        wanted = source(IDS, use_cache=False).logits
    if not torch.isfinite(found).all():
        return "fails: logits are not finite"
    if near and (error := float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())) > NEAR:
        return f"fails: logits differ by {error:.3f}"
    return "works"


def _lost(source: Any, result: Any) -> str:
    """A tensor outside the layers' matrices that is not in the result as it is in the source."""
    before, after = source.state_dict(), result.state_dict()
    config = getattr(result.config, "quantization_config", None)
    forms = tuple(config.modules) if config is not None else ()
    if len(before) > len(after) + 4 and not forms:
        return ""  # layers are dropped and renumbered
    for name, tensor in before.items():
        if any(name == path or name.startswith(path + ".") for path in forms):
            continue
        if name in after and after[name].shape == tensor.shape and not _same(tensor, after[name]) and len(before) == len(after):
            return f"'{name}' has other values"
    return ""


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def _said(err: str) -> str:
    lines = [line.strip() for line in err.strip().splitlines() if line.strip()]
    return " ".join(lines[:2])
