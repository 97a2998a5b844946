"""What lrc does with one type of model: a tiny random checkpoint goes through compress, verify and from_pretrained."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from commandline import run_lrc
from safetensors.torch import save_file
from tiny import tiny_text, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .tiny_configs import tiny_config

IDS = torch.arange(3, 40)[None]
NEAREST = "rtn at 8 bits"
# name of the step -> arguments; the first one loses almost nothing
STEPS: dict[str, list[str]] = {
    NEAREST: ["--recipe", "rtn", "--set", "settings.bits=8", "--set", "settings.group_size=16"],
    "svd-llm": ["--recipe", "svd-llm", "--ratio", "0.3"],
    "gptq": ["--recipe", "gptq", "--set", "settings.group_size=16"],
    "block-influence": ["--recipe", "block-influence", "--set", "depth.drop=1"],
}
READING = ["--samples", "8", "--length", "48"]
NEAR = 0.1  # relative error of the logits at 8 bits, median over the tokens: a mixture may send some to other experts


@dataclass
class Outcome:
    """What happened with one type: step -> 'works', 'refused: REASON' (by the plan), or 'fails: WHAT'."""

    model_type: str
    steps: dict[str, str] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether nothing ended in a traceback or after the work."""
        return all(said.startswith(("works", "refused")) for said in self.steps.values())


def types() -> list[str]:
    """Every type that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(model_type: str) -> str:
    """The class of the type's causal language model."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def tiny_model(config: Any, auto: Any = AutoModelForCausalLM) -> Any:
    """A model with random weights. Vectors, experts and stored buffers are random too, so that losing one is noticed."""
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    stored = model.state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif parameter.ndim >= 2 and not (torch.isfinite(parameter).all() and float(parameter.std()) > 1e-3):
                parameter.normal_(std=0.08)  # some classes leave experts or a router empty
        for name, buffer in model.named_buffers():
            if name in stored and buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer) * 0.1)
    return model.eval()


def write_checkpoint(model_type: str, folder: Path, whole: bool = False) -> Any:
    """Write a tiny checkpoint of a type with a tokenizer; returns its model as loaded, or None where transformers builds none.

    Args:
        whole: of a type that has both, the model with its other modalities rather than its text model alone.
    """
    config = tiny_config(model_type)
    tiny_tokenizer().save_pretrained(folder)
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not whole
    try:
        model = tiny_model(config, AutoModelForCausalLM if causal else AutoModelForMultimodalLM)
    except (AttributeError, ImportError, ValueError):  # it needs another package, or has no class for its own configuration
        config.save_pretrained(folder)
        save_file({"model.weight": torch.zeros(2, 2)}, folder / "model.safetensors", metadata={"format": "pt"})
        return None
    model.save_pretrained(folder)
    # as transformers loads it: it gives some tensors of the file (the last of Zaya's biases) a value of its own
    return type(model).from_pretrained(folder).eval()


def look_at(model_type: str, folder: Path, steps: Sequence[str] = tuple(STEPS)) -> Outcome:
    """Take a tiny checkpoint of a type through some steps.

    Args:
        folder: for the checkpoint and the results.
    """
    text = folder / "text.txt"
    text.write_text(tiny_text(1500))
    outcome = Outcome(model_type)
    try:
        source = write_checkpoint(model_type, folder / "model")
        for step in steps:
            outcome.steps[step] = _step(source, step, text, folder)
    except Exception as error:  # noqa: BLE001 whatever it is, it is this type's outcome
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"fails: {type(error).__name__}: {str(error)[:160]} ({Path(where.filename).name}:{where.lineno})"
        outcome.steps |= {step: what for step in steps if step not in outcome.steps}
    return outcome


def _step(source: Any, step: str, text: Path, folder: Path) -> str:
    asked, out = [str(folder / "model"), *STEPS[step]], folder / step.replace(" ", "-")
    if step != NEAREST:
        asked += ["--calibration", f"text:{text}", *READING]
    done = run_lrc("compress", *asked, "--out", out)
    if done.code:
        planned = run_lrc("plan", *asked)
        return "refused: " + _said(planned.err, folder) if planned.code else "fails: " + _said(done.err, folder)
    if step == NEAREST and (checked := run_lrc("verify", out)).code:  # compress has checked every result, but for its hashes
        return "fails: " + _said(checked.err, folder)
    result = type(source).from_pretrained(out).eval()
    with torch.no_grad():
        found, wanted = (model(IDS, use_cache=False).logits for model in (result, source))
    if not torch.isfinite(found).all():
        return "fails: logits are not finite"
    if step == NEAREST:
        if changed := changed_tensors(source, result):
            return f"fails: '{changed[0]}' and {len(changed) - 1} more are not as they were"
        if (error := float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())) > NEAR:
            return f"fails: logits differ by {error:.3f}"
    return "works"


def changed_tensors(source: Any, result: Any) -> list[str]:
    """Tensors of a model that have no form in its compressed result, and are not equal there."""
    forms: Mapping[str, Any] = result.config.quantization_config.modules
    after = result.state_dict()
    return [
        name
        for name, tensor in source.state_dict().items()
        if name not in forms
        and name.rpartition(".")[0] not in forms
        and not (name in after and torch.equal(after[name], tensor))
    ]


def _said(err: str, folder: Path) -> str:
    lines = [line.strip() for line in err.strip().splitlines() if line.strip()]
    return "".join(lines[:1]).removeprefix("lrc: ").replace(str(folder / "model"), "MODEL").replace(str(folder), "OUT")
