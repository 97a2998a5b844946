"""The model card of a compressed checkpoint: description, loading, citation."""

from __future__ import annotations

from ..depth.base import get_repair, get_score
from ..plan.plan import Planned


def _origin(plan: Planned) -> str:
    method, lines = plan.recipe.compression[0], []
    if plan.recipe.depth is not None:
        score = get_score(plan.recipe.depth.score)
        sublayers = plan.model_edit.removed
        what = f"{len(sublayers)} sub-layers" if sublayers else f"{len(plan.dropped)} of {plan.layers} layers"
        lines.append(f"{what} were dropped by {score.name}. Source: {score.source}.")
        if plan.recipe.depth.repair != "none":
            repair = get_repair(plan.recipe.depth.repair)
            lines.append(f"Repaired by {repair.name}. Source: {repair.source}.")
    if method.source:
        lines.append(f"{method.summary} Source: {method.source}.")
    return " ".join(lines)


def model_card(plan: Planned, plain: bool) -> str:
    """The text of README.md, in Markdown with the hub's YAML header.

    Args:
        plan: the final plan.
        plain: whether the result can be loaded without lrc.
    """
    method = plan.recipe.compression[0]
    register = "" if plain else "import lrc  # registers the format with transformers\n"
    compressed = sum(not step.choice.dense for step in plan.steps)
    return f"""---
library_name: transformers
base_model: "{plan.model["name"]}"
tags: [lrc, compressed, {", ".join(way.name for way in method.alternatives or (method,))}]
---

# {plan.model["name"]}, compressed by lrc

{_origin(plan)}

| | before | after |
|---|---|---|
| compressed matrices | {plan.targets_before:,} bytes | {plan.targets_after:,} bytes ({plan.ratio:.1%} removed) |
| bits per weight of these | {8 * plan.dtype.itemsize} | {plan.bits:.2f} |
| whole model | {plan.whole_bytes:,} bytes | {plan.whole_after:,} bytes ({plan.whole_ratio:.1%} removed) |

{compressed} of {len(plan.steps)} matrices are stored in another form; `lrc.json` lists every one with its error.

```python
{register}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```
"""
