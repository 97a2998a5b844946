"""The model card of a compressed checkpoint, fit to be published: what it is, how to load it, how it was made, its licence.

No path of this machine is in it. Figures are those that the run measured itself, each with its protocol.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.journal import without_paths
from ..checkpoint.location import Location
from ..checkpoint.untrusted.files import MB, is_regular
from ..depth.base import get_repair, get_score
from ..export.base import loading
from ..plan.plan import Planned

_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the original's front matter
_LICENCES = re.compile(r"(licen[sc]e|notice|use_policy|usage_policy)([.\-_].*)?", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """What the original says of itself.

    Args:
        name: its id on the hub, or the name of its folder or file.
        front: entries of its card's front matter that hold for the result as well.
        licences: names of licence files, which are copied beside the weights.
    """

    name: str
    front: dict[str, Any] = field(default_factory=dict)
    licences: tuple[str, ...] = ()

    @classmethod
    def of(cls, location: Location) -> Origin:
        """Read it from the original's files."""
        if location.gguf:
            return cls(_name(location, {}))
        config = _mapping(location.path / "config.json", json.loads)
        licences = sorted(name for name in location.beside().files if _LICENCES.fullmatch(name))
        return cls(_name(location, config), _front(location.path / "README.md"), tuple(licences))


def _name(location: Location, config: Mapping[str, Any]) -> str:
    """The id that the configuration names if it is that of the folder, and no other model's; else the folder's own name."""
    written = location.name
    path = Path(written).expanduser()
    if written.startswith("pkg:") or not path.exists():
        return written
    own, named = path.resolve().name, config.get("_name_or_path")
    fits = isinstance(named, str) and _HUB_ID.fullmatch(named) and named.rpartition("/")[2].lower() == own.lower()
    return str(named) if fits else own


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        held = parse(path.read_bytes()[: 4 * MB]) if is_regular(path) else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}  # of the original's words about itself: what cannot be read is not repeated
    return held if isinstance(held, dict) else {}


def _front(path: Path) -> dict[str, Any]:
    found = _mapping(path, lambda data: _yaml_head(data.decode(errors="replace")))
    return {key: found[key] for key in _CARRIED if isinstance(found.get(key), str | list)}


def _yaml_head(text: str) -> Any:
    head = re.match(r"\A\s*---\n(.{0,20000}?)\n---\s*\n", text, re.DOTALL)
    return {} if head is None or "&" in head[1] else yaml.safe_load(head[1])  # no anchors: they can grow without end


def model_card(plan: Planned, model: Any, record: Mapping[str, Any], origin: Origin, plain: bool) -> str:
    """The text of README.md, in Markdown with the hub's YAML header.

    Args:
        plan: the final plan.
        model: the original's model, of any device.
        record: what lrc.json will hold.
        origin: what the original says of itself.
        plain: whether the result can be loaded without lrc.
    """
    method = plan.recipe.compression[0]
    tags = ["lrc", "compressed", *(way.name for way in method.alternatives or (method,))]
    front = {"library_name": "transformers", "base_model": origin.name, **origin.front, "tags": tags}
    compressed = sum(not step.choice.dense for step in plan.steps)
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {origin.name}, compressed by lrc

{_origin(plan)}

| | before | after |
|---|---|---|
| compressed matrices | {plan.targets_before:,} bytes | {plan.targets_after:,} bytes ({plan.ratio:.1%} removed) |
| bits per weight of these | {8 * plan.dtype.itemsize} | {plan.bits:.2f} |
| whole model | {plan.whole_bytes:,} bytes | {plan.whole_after:,} bytes ({plan.whole_ratio:.1%} removed) |

{compressed} of {len(plan.steps)} matrices are stored in another form; `lrc.json` lists every one with its error.

{loading(model, "" if plain else "import lrc  # registers the format with transformers")}

## How it was made

{_calibration(record)}

```
lrc compress "{origin.name}" --recipe recipe.yaml --out OUT
```

with this `recipe.yaml`:

```yaml
{yaml.safe_dump(without_paths(record["recipe"]), sort_keys=False, allow_unicode=True).strip()}
```

Versions: {", ".join(f"{name} {version}" for name, version in record["versions"].items())}.

## Quality

{_figures(plan, record)}

## Licence

{_licence(origin)}
"""


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


def _calibration(record: Mapping[str, Any]) -> str:
    parts = record["calibration"]["provenance"]
    if not parts:
        return "No calibration text was used."
    length = record["recipe"]["calibration"]["length"]
    texts = ", ".join(
        f"{without_paths(part['source'])}{' (' + part['split'] + ')' if part.get('split') else ''}: {part['samples']} samples"
        for part in parts
    )
    return f"Calibration: {texts} of {length} tokens (token hash {record['calibration']['hash'][:16]})."


def _figures(plan: Planned, record: Mapping[str, Any]) -> str:
    lines = []
    if (found := plan.found) is not None:
        lines.append(
            f"Token perplexity on {found.tokens:,} held-out calibration tokens: {found.before:.3f} before, {found.after:.3f} "
            "after (measured by the search for the size, which chose by it)."
        )
    repair, refinement = record["depth"].get("repair") or {}, record.get("refinement") or {}
    if {"loss_without", "loss", "held_out_tokens"} <= repair.keys():
        lines.append(
            f"Loss on {repair['held_out_tokens']:,} held-out calibration tokens: {repair['loss_without']:.4f} nats per token "
            f"without the repair, {repair['loss']:.4f} with it."
        )
    if refinement:
        lines.append("It was refined on the calibration text; `lrc.json` has the held-out losses (`refinement`).")
    lines.append("Nothing else was measured when it was made; `lrc eval` measures it on texts and tasks, beside the original.")
    return "\n".join(f"* {line}" for line in lines)


def _licence(origin: Origin) -> str:
    said = origin.front.get("license_name") or origin.front.get("license")
    files = ", ".join(f"`{name}`" for name in origin.licences)
    if said:
        held = (
            f"The original's licence applies: {said if isinstance(said, str) else ', '.join(map(str, said))}, as its card says."
        )
    elif files:
        held = "The original's licence applies."
    else:
        held = "The original's files name no licence. Whatever licence it has applies to this model as well."
    return held + (f" Its text: {files}." if files else "")
