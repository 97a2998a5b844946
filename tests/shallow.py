"""Models that lose layers: by the real pipeline, and by hand."""

from __future__ import annotations

import torch

from lrc.calibrate.data import load_calibration
from lrc.checkpoint.hf_quantizer import open_model
from lrc.checkpoint.location import locate
from lrc.model.view import ModelView
from lrc.plan.load_recipe import load_recipe
from lrc.plan.planner import make_draft
from lrc.run.pipeline import carry_out

IDS = torch.arange(3, 15)[None]


def compress(model, out, text, recipe="block-influence", **overrides):
    wanted = {"calibration.source": f"text:{text}", "calibration.samples": 8, "calibration.length": 32} | overrides
    view = ModelView(locate(str(model)))
    draft = make_draft(view, load_recipe(recipe, wanted))
    calibration = load_calibration(draft.recipe.calibration, view.location.tokenizer())
    return carry_out(draft, view, calibration, out).plan, calibration


def without(model, dropped):
    """The original model with layers taken out by hand."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    layers = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    kept = [layer for index, layer in enumerate(layers) if index not in dropped]
    for name, module in model.named_modules():
        for child, value in module.named_children():
            if value is layers:
                setattr(model.get_submodule(name), child, torch.nn.ModuleList(kept))
    for _, module in model.named_modules():
        if hasattr(module, "config"):
            module.config.num_hidden_layers = len(kept)
            kinds = getattr(module.config, "layer_types", None)
            if kinds is not None and len(kinds) == len(layers):
                module.config.layer_types = [kind for index, kind in enumerate(kinds) if index not in dropped]
    return model


def deep(tiny_checkpoints, family="llama", layers=5, **changes):
    if family == "gemma3_text":
        changes["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    depth = {"n_layer" if family == "gpt2" else "num_hidden_layers": layers}
    return tiny_checkpoints(family, initializer_range=0.2, **depth, **changes)


def logits(folder):
    """What a checkpoint answers to `IDS`."""
    with torch.no_grad():
        return open_model(str(folder))[0](IDS).logits
