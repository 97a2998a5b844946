"""Recipes described for a person who chooses: their family, what they need, and what they cost."""

from __future__ import annotations

from ...compress.base import BACKWARD_NEEDS, get_method
from ..recipe import Recipe

# recipe -> for whom it is; the first ones to try
START = {
    "lrc-fast": "the default: one-shot, minutes on a small model; every number stays in 16 bits",
    "lrc-best": "the least loss at a size (1 to 6 bits are welcome), when you can wait for a backward pass",
    "gptq": "4-bit codes that vLLM and others open (lrc export --to compressed-tensors or gptq)",
}
_FOLDERS = {
    "low_rank": "low rank",
    "channels": "pruned channels",
    "quantize": "quantized",
    "dictionary": "dictionary",
}


def family(name: str, recipe: Recipe) -> str:
    """The family of a shipped recipe, for grouping."""
    if name.startswith("lrc-"):
        return "lrc's own"
    if recipe.depth is not None and recipe.compresses_nothing:
        return "fewer layers"
    if recipe.alternatives:
        return "a choice for each matrix"
    if recipe.steps or recipe.depth is not None:
        return "two steps"
    assert recipe.method is not None
    return _FOLDERS[get_method(recipe.method).solve.__module__.split(".")[-2]]


def needs(recipe: Recipe) -> list[str]:
    """What a run of the recipe takes beside the weights, from the cheapest to the dearest."""
    method = recipe.compression[0]
    found = ["text" if recipe.reads_text else "no text"]
    if recipe.reads_text:
        found.append("two forward passes" if recipe.propagate == "compressed" else "a forward pass")
    if recipe.allocation == "kl":
        found.append("probes of every matrix")
    if method.needs & BACKWARD_NEEDS or recipe.allocation == "fisher":
        found.append("a backward pass")
    if recipe.depth is not None and recipe.depth.repair not in (None, "none"):
        found.append("a repair")
    if recipe.refine is not None:
        found.append("training")
    return found
