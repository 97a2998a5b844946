"""SGLang: the quantization method `lrc`.

SGLang loads weights by name and passes over those for which it has no parameter, so completeness is checked when a layer is
finished. Only plugins.py imports this file, after it has looked at the version of SGLang.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.runtime_context import get_parallel
from torch import nn

from ..checkpoint.hf_quantizer import METHOD
from ..errors import RequestError
from .linear_method import LinearMethod
from .result import EXPORT, Result, require_one_device, shards

# SGLang tells a quantization method nothing of the model's type. These are the fused layers of Llama-like models.
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class LrcConfig(QuantizationConfig):
    """The `quantization_config` of a result.

    Args:
        result: what it says.
    """

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70  # torch's own operations, which have no limit of their own; the lowest that SGLang runs on

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LrcConfig:
        return cls(Result({key: value for key, value in config.items() if key != "packed_modules_mapping"}))

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The linear method of a layer; None for layers that are no linear ones.

        Raises:
            RequestError: the layer is compressed, and of a kind that cannot be served.
        """
        names = shards(prefix, FUSED)
        if isinstance(layer, LinearBase) and any(name in self.result.specs for name in names):
            parallel = get_parallel()
            require_one_device(parallel.tp_size, parallel.pp_size)
            return LrcLinearMethod(self.result, names, "with_bias")
        if prefix and (found := self.result.below(prefix)):
            raise RequestError(f"'{found[0]}' is compressed; lrc serves the linear layers of Llama-like models only.", EXPORT)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class LrcLinearMethod(LinearMethod, LinearMethodBase):
    """The shared method as SGLang's own kind."""
