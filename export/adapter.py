"""Low-rank corrections as an adapter of PEFT beside the weights of the base: `weight + B A`, with a scale of one.

transformers and vLLM read both files from the folder of the model. Ranks may differ from module to module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from ..checkpoint.reading.which import ADAPTER, ADAPTER_WEIGHTS, EMBEDDED

CONFIG, WEIGHTS = ADAPTER, ADAPTER_WEIGHTS


def adapter_config(ranks: Mapping[str, int]) -> bytes:
    """The content of adapter_config.json.

    Args:
        ranks: module path -> rank of its correction.
    """
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    sizes = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
    content = dict(EMBEDDED) | sizes | {"target_modules": sorted(ranks)}
    return (json.dumps(content, indent=2) + "\n").encode()


def adapter_tensors(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors.

    Args:
        factors: path.left (out, rank) and path.right (rank, in).
    """
    named = {"left": "lora_B", "right": "lora_A"}
    found = {}
    for name, tensor in factors.items():
        path, _, side = name.rpartition(".")
        found[f"base_model.model.{path}.{named[side]}.weight"] = tensor.contiguous()
    return found


def adapter_nbytes(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]], element: int) -> int:
    """Bytes of the adapter's tensors; `shapes` are (out, in)."""
    return sum(rank * sum(shapes[path]) * element for path, rank in ranks.items())
