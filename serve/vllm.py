"""vLLM: the quantization method `lrc`.

vLLM builds its model from the configuration, asks `LrcConfig.get_quant_method` for each layer, and then reads the weights. Only
plugins.py imports this file, after it has looked at the version of vLLM.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from ..checkpoint.hf_quantizer import METHOD
from ..errors import RequestError
from .linear_method import FORM_BIAS, LinearMethod
from .result import EXPORT, Result, require_one_device, require_served, shards


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
        return 70  # torch's own operations, which have no limit of their own; the lowest that vLLM runs on

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LrcConfig:
        return cls(Result(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called with the model's configuration before the model is built."""
        if hf_config is not None:
            require_served(hf_config.model_type)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Called with the renaming of modules; a second call finds nothing to rename."""
        self.result.rename({name: hf_to_vllm_mapper.map_name(name) or name for name in self.result.specs})

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Called (on the instance) when weights are about to be read: each compressed module must have found its layer."""
        self.result.require_taken()
        renamed = {re.compile(rf"^{re.escape(name)}\.bias$"): f"{name}.{FORM_BIAS}" for name in self.result.extra_biases}
        return WeightsMapper(orig_to_new_regex=renamed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The linear method of a layer; None for layers that are no linear ones.

        Raises:
            RequestError: the layer is compressed, and of a kind that cannot be served.
        """
        if isinstance(layer, LinearBase):
            names = shards(prefix, self.packed_modules_mapping)
            if not any(name in self.result.specs for name in names):
                return UnquantizedLinearMethod()
            require_one_device(get_tensor_model_parallel_world_size(), get_pp_group().world_size)
            return LrcLinearMethod(self.result, names, "has_bias")
        if isinstance(layer, (VocabParallelEmbedding, RoutedExperts)) and (
            found := self.result.below(prefix) if prefix else []
        ):
            raise RequestError(f"'{found[0]}' is compressed; lrc's plugin serves linear layers inside the model only.", EXPORT)
        return None


class LrcLinearMethod(LinearMethod, LinearMethodBase):
    """The shared method as vLLM's own kind."""
