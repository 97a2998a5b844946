"""Compressed checkpoints in transformers: `import lrc`, then the ordinary `from_pretrained`.

lrc registers a quantizer under the name that `config.json` contains (`quant_method: lrc`). Before weights are loaded it
replaces the modules named there by the modules of their forms; transformers does everything else (devices, dtypes, sharding,
saving). Tensor names in a compressed checkpoint are the model's own, so no renaming applies to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..compress.forms.base import Spec
from ..compress.forms.quantized import QuantizedLinear
from ..compress.install_forms import install_forms, multiply_out
from ..errors import CheckpointError, ModelError, one_line
from .architecture import model_class
from .location import locate
from .weights import SafetensorsSource

METHOD = "lrc"
FORMAT_VERSION = 1


class LrcConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint.

    Args:
        modules: module path -> the spec of its form; a fused experts parameter has `{"kind": "experts", "forms": [...]}`.
        format_version: of this configuration; a version newer than `FORMAT_VERSION` is refused.
        lrc_version: the version of lrc that wrote the checkpoint, for messages.
    """

    def __init__(
        self, modules: dict[str, Spec] | None = None, format_version: int = FORMAT_VERSION, lrc_version: str = "", **_: Any
    ) -> None:
        self.quant_method: Any = METHOD
        self.modules = modules or {}
        self.format_version = format_version
        self.lrc_version = lrc_version


class LrcQuantizer(HfQuantizer):
    """Builds the forms' modules; transformers loads everything else itself."""

    requires_calibration = True
    quantization_config: LrcConfig

    def validate_environment(self, *_: Any, **__: Any) -> None:
        version = self.quantization_config.format_version
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"This checkpoint has lrc format {version} (written by lrc {self.quantization_config.lrc_version}); "
                f"this lrc reads up to format {FORMAT_VERSION}.",
                "Upgrade lrc.",
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        return []  # tensors have the model's own names

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        install_forms(model, self.quantization_config.modules, kwargs.get("dtype") or model.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.pack()

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        multiply_out(model, dtype or model.dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def install_stored(model: Any) -> None:
    """Install the forms that the model's own config.json names, if it names any.

    Raises:
        CheckpointError: they do not fit the model, or a newer lrc wrote them.
    """
    stored = getattr(model.config, "quantization_config", None)
    if stored is None:
        return
    config = LrcConfig(**(stored if isinstance(stored, dict) else stored.to_dict()))
    LrcQuantizer(config).validate_environment()
    install_forms(model, config.modules, model.dtype)


def register() -> None:
    """Register lrc with transformers; calling it again changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LrcConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(LrcQuantizer)


def open_model(
    model: str, *, dtype: torch.dtype | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load a model or a compressed checkpoint whole, for evaluation: (model, tokenizer).

    Args:
        model: a hub id, folder, `.gguf` file, `pkg:PACKAGE/FILE`, or lrc's output folder.
        dtype: None takes the checkpoint's own (float32 for GGUF).
        device: a torch device, several separated by commas to distribute the layers, or 'auto' for all GPUs.

    Raises:
        ModelError: there is no such model, or the folder holds an unfinished run.
        CheckpointError: weights are missing or damaged, or do not fit the model.
    """
    from safetensors import SafetensorError

    location = locate(model)
    config = location.config(trust_remote_code)
    own = torch.float32 if location.gguf else SafetensorsSource(location.path).dtype  # the error names a damaged shard
    try:
        found: Any = model_class(config).from_pretrained(
            location.path,
            gguf_file=location.gguf,
            dtype=dtype or config.dtype or own,
            **_placed(device),
            trust_remote_code=trust_remote_code,
            use_safetensors=None if location.gguf else True,
            ignore_mismatched_sizes=True,  # refused below, with the tensor's name
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{model} cannot be loaded: {one_line(error)}", "Get or write it again.") from error
    except OSError as error:
        raise ModelError(f"{model} cannot be loaded: {one_line(error)}", "Give a folder with safetensors.") from error
    loaded, info = found
    _require_whole(model, loaded, info)
    return loaded.eval(), location.tokenizer(trust_remote_code)


def _placed(device: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that place a model on these devices."""
    devices = [torch.device(part.strip()) for part in device.split(",")] if device != "auto" else []
    if len(devices) == 1:
        return {"device_map": {"": devices[0]}}
    room = {each.index: torch.cuda.mem_get_info(each)[0] for each in devices}
    return {"device_map": "auto"} | ({"max_memory": room} if room else {})


def _require_whole(model: str, loaded: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model with missing or unfitting tensors; transformers initialises them at random and only warns."""
    if unfitting := sorted(info["mismatched_keys"]):
        name, got, wanted = unfitting[0]
        raise CheckpointError(
            f"{model}: '{name}' has shape {tuple(got)}, the model of config.json wants {tuple(wanted)}.",
            "Weights and config.json do not belong together.",
        )
    bare = (name for name, tensor in loaded.state_dict().items() if tensor.is_meta)
    if missing := sorted({*info["missing_keys"], *bare}):
        raise CheckpointError(
            f"{model}: {len(missing)} tensors of the model are in no file, '{missing[0]}' first.",
            "The checkpoint is incomplete, or config.json describes another model.",
        )


register()
