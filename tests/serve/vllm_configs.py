"""What vLLM's own classes read from an export's configuration; run by the tests with the python of the engine's environment.

    python vllm_configs.py FOLDER

Prints one line of JSON: what the class of the export's quantization says, and that of its adapter where it has one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.quantization import get_quantization_config


def read(folder: Path) -> dict[str, Any]:
    """The sizes that vLLM found."""
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    try:
        config = get_quantization_config(stored["quant_method"]).from_config(stored)
    except ValueError as error:
        return {"error": str(error)}
    if stored["quant_method"] == "gptq":
        return {"bits": config.weight_bits, "group_size": config.group_size}
    weights = next(iter(config.target_scheme_map.values()))["weights"]
    said = {"bits": weights.num_bits, "group_size": weights.group_size}
    if (folder / "adapter_config.json").is_file():
        adapter = PEFTHelper.from_local_dir(str(folder), None)
        adapter.validate_legal(LoRAConfig(max_lora_rank=16))
        rank, scaling = adapter.get_rank_and_scaling("model.layers.0.mlp.up_proj")
        said |= {"rank": rank, "scaling": scaling}
    return said


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1]))))
