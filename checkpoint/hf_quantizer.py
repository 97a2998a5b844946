"""Compressed checkpoints in transformers: `import lrc`, then the ordinary `from_pretrained`.

lrc registers a quantizer under the name that `config.json` contains (`quant_method: lrc`). Before weights are loaded it
replaces the modules named there by the modules of their forms; transformers does everything else (devices, dtypes, sharding,
saving). Tensor names in a compressed checkpoint are the model's own, so no renaming applies to them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..compress.forms.base import Spec, kinds_in
from ..compress.forms.dictionary import DictionaryLinear
from ..compress.forms.quantized import QuantizedLinear
from ..compress.install_forms import install_forms, multiply_out
from ..errors import CheckpointError, ModelError, one_line, problem
from .architecture import built, model_class
from .location import Location, locate
from .reading.fp8 import Fp8Source, open_weights, quantization_of, without_quantization
from .reading.weights import SafetensorsSource, dtype_of_gguf, numbers_held
from .reading.which import declared_quantization, is_embedded, quantization_method
from .untrusted.foreign import foreign
from .untrusted.json_text import dotted, walked
from .untrusted.skeleton import require_affordable, require_finite_tables

METHOD = "lrc"
FORMAT_VERSION = 1
_NO_MODULES: Mapping[str, Spec] = MappingProxyType({})  # what is not given; null is no mapping
_FEW = 1 << 24  # numbers
_SPLIT = frozenset({"low-rank", "dense", "pruned"})  # forms that tensor parallelism can divide
_DEEPEST = 24  # levels of a spec; the deepest that lrc writes, a corrected factor of an expert, has 10


class Stored(BaseModel):
    """The schema of what `quantization_config` holds; the spec of each module is checked where its module is built."""

    model_config = ConfigDict(strict=True)

    modules: dict[str, Spec]
    format_version: int = Field(ge=1)
    lrc_version: str


# Where lrc was not imported, transformers only warns of an unknown quantization and later fails on the shapes of the tensors;
# neither says what to do. But it raises, with the text of this entry, if the entry names no safetensors file
# (`_get_resolved_checkpoint_files`). Where lrc was imported, `update_attn_implementation` below takes the entry out before.
WITHOUT_LRC = {
    "transformers_weights": (
        "this model is compressed by lrc, which is not imported here. Install lrc (pip install it from its repository; "
        "lrc.json beside the weights says which version wrote them) and put `import lrc` before from_pretrained"
    )
}


class LrcConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint.

    Args:
        modules: module path -> the spec of its form; a fused experts parameter has `{"kind": "experts", "forms": [...]}`.
        format_version: of this configuration; a version newer than `FORMAT_VERSION` is refused.
        lrc_version: the version of lrc that wrote the checkpoint, for messages.

    Raises:
        CheckpointError: a value has another type.
    """

    def __init__(
        self, modules: Any = _NO_MODULES, format_version: int = FORMAT_VERSION, lrc_version: str = "", **_: Any
    ) -> None:
        self.quant_method: Any = METHOD
        try:
            stored = Stored(
                modules=dict(_NO_MODULES) if modules is _NO_MODULES else modules,
                format_version=format_version,
                lrc_version=lrc_version,
            )
        except ValidationError as error:
            raise CheckpointError(
                f"The checkpoint's quantization_config is none of lrc's: {problem(error)}.", "Its config.json was changed."
            ) from error
        _require_shallow(stored.modules)
        self.modules = stored.modules
        self.format_version = stored.format_version
        self.lrc_version = stored.lrc_version


def _require_shallow(modules: Mapping[str, Spec]) -> None:
    """Refuse forms in forms without end, and a shared factor inside another form, where no loader looks for it."""
    for path, value in walked(modules):
        if len(path) > _DEEPEST or (path[-1:] == ("owner",) and len(path) > 2 and value is not None):
            raise CheckpointError(
                f"The checkpoint's quantization_config does not fit this model: '{dotted(path)}' is nested too deeply.",
                "Its config.json was changed.",
            )


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

    def update_attn_implementation(self, config: Any) -> Any:
        """Called by transformers with the configuration before it looks for the files of the weights."""
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        return config

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        return []  # tensors have the model's own names

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        _require_no_split(self.quantization_config.modules, getattr(model.config, "distributed_config", None))
        install_forms(model, self.quantization_config.modules, kwargs.get("dtype") or model.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.pack()
            elif isinstance(module, DictionaryLinear) and module.support.is_cuda:
                module.starts()  # compiled code cannot make them

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # transformers gives the dtype of the configuration, which is a name after `save_pretrained`
        multiply_out(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether an adapter can be trained: `lora_config` of model/adapters.py tells PEFT about the modules."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the stored tensors can be trained themselves: codes cannot."""
        return not any(path[-1:] == ("grid",) for path, _ in walked(self.quantization_config.modules))


def _require_no_split(modules: Mapping[str, Spec], distributed: Any) -> None:
    """Refuse to split forms over devices inside a matrix, except those for which that was compared with the whole model.

    transformers divides the tensors that its plan finds under a module's name. Of two factors torch then divides the product as
    well (DTensor); a fused parameter of experts has other names in a compressed model, and would be divided by half.

    Raises:
        ModelError: the model has a form that cannot be split.
    """
    sizes = (getattr(distributed, name, None) or 1 for name in ("tp_size", "ep_size"))
    if distributed is None or (all(size == 1 for size in sizes) and not getattr(distributed, "tp_plan", None)):
        return
    kinds = set().union(*map(kinds_in, modules.values()))
    if whole := sorted(kinds - _SPLIT):
        raise ModelError(
            f"Tensor parallelism divides matrices over devices, and this model has forms that cannot be divided so: "
            f"{', '.join(whole)}.",
            "Give device_map='auto', which puts whole layers on devices; or export it: lrc export OUT --to dense.",
        )


def install_stored(model: Any) -> None:
    """Install the forms that the model's own config.json names, if it names any.

    Raises:
        CheckpointError: they do not fit the model, or a newer lrc wrote them.
    """
    stored = getattr(model.config, "quantization_config", None)
    if stored is None:
        return
    if not is_lrc(stored):
        raise CheckpointError(
            f"config.json has a quantization_config that is not {METHOD}'s.", "Its config.json was changed; get it again."
        )
    held = stored if isinstance(stored, dict) else stored.to_dict()
    config = LrcConfig(**{str(key): value for key, value in held.items()})
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
        dtype: None takes the checkpoint's own (bfloat16 for a quantized GGUF file).
        device: a torch device, several separated by commas to distribute the layers, or 'auto' for all GPUs.

    Raises:
        ModelError: there is no such model, the folder holds an unfinished run, or a package is missing that it needs.
        CheckpointError: weights are missing or damaged, or do not fit the model.
    """
    location = locate(model)
    config = location.config(trust_remote_code)
    source = require_loadable(location, config, dtype, device)
    if not trust_remote_code:
        _require_held(location, config, source)
    kind: Any = model_class(config)
    settings: dict[str, Any] = {"use_safetensors": True}
    if isinstance(source, Fp8Source):  # transformers would need the declaration, and another library for some of them
        without_quantization(config)
        with torch.device("meta"):
            kind = type(built(config, torch.get_default_dtype(), trust_remote_code))
        settings = {"state_dict": source.read(source.names()), "config": config}
    elif location.gguf:
        settings = {"gguf_file": location.gguf, "use_safetensors": None}
    own = dtype_of_gguf(location.path / str(location.gguf)) if source is None else source.dtype
    try:
        with foreign(CheckpointError, f"{model} cannot be loaded", "Get or write it again."):
            found: Any = kind.from_pretrained(
                None if isinstance(source, Fp8Source) else location.path,
                dtype=dtype or (own if isinstance(source, Fp8Source) else config.dtype or own),
                **_placed(device),
                **settings,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # refused below, with the tensor's name
                output_loading_info=True,
            )
    except CheckpointError as error:
        if isinstance(error.__cause__, ImportError):
            raise _package_missing(model, config, error.__cause__) from error
        if not isinstance(error.__cause__, OSError):
            raise
        raise ModelError(error.what, "Give a folder with safetensors.") from error
    loaded, info = found
    _require_whole(model, loaded, info)
    if is_embedded(location.path) and not getattr(loaded, "_hf_peft_config_loaded", False):
        raise CheckpointError(f"{model}: transformers did not load its adapter.", "Give it to another version of transformers.")
    require_finite_tables(loaded, model)
    if isinstance(source, Fp8Source):
        _adopt(loaded, location)
    return loaded.eval(), location.tokenizer(trust_remote_code)


def require_loadable(
    location: Location, config: Any, dtype: torch.dtype | None = None, device: str = "cpu"
) -> SafetensorsSource | None:
    """Refuse a checkpoint that `open_model` cannot load, from its files' headers; returns its weights (None for GGUF).

    Raises:
        ModelError: a package is missing that reads its quantized weights, transformers does not know that quantization, or it
            is not clear which files are the model.
        CheckpointError: a file is missing or damaged.
    """
    if location.gguf:
        return None
    said = quantization_of(location.path, config)
    if said is None or said.fp8:
        return open_weights(location.path, config, location.name, dtype)
    source = SafetensorsSource(location.path, config)
    if is_embedded(location.path) and importlib.util.find_spec("peft") is None:
        raise ModelError(f"{location.name} has corrections in an adapter of PEFT, which is not installed.", "pip install peft")
    declared = declared_quantization(config)
    if not declared or not AutoHfQuantizer.supports_quant_method(declared):
        raise ModelError(f"{location.name} is quantized by {said.method}, which transformers does not load.",
                         "Give the 16-bit original, or a copy in a format that transformers loads.")  # fmt: skip
    try:
        AutoHfQuantizer.from_config(declared, pre_quantized=True).validate_environment(
            device_map=_placed(device)["device_map"], weights_only=True
        )
    except (ImportError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _package_missing(location.name, config, error) from error
    return source


# quantization -> the pip package that transformers reads it with
_PACKAGES = {
    "awq": "gptqmodel", "gptq": "optimum gptqmodel", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors",
    "aqlm": "aqlm", "quanto": "optimum-quanto", "hqq": "hqq", "eetq": "eetq", "torchao": "torchao", "vptq": "vptq",
    "spqr": "spqr_quant", "auto-round": "auto-round", "quark": "amd-quark", "mxfp4": "kernels", "fp_quant": "fp_quant",
}  # fmt: skip


def _package_missing(name: str, config: Any, error: Exception) -> ModelError:
    """What `from_pretrained` says where it cannot read quantized weights, with the package's name."""
    method = quantization_method(config)
    package = _PACKAGES.get(str(method))
    remedy = "Give the 16-bit original instead."
    if package is not None and isinstance(error, ImportError):
        remedy = f"pip install {package}, or give the 16-bit original instead."
    return ModelError(f"{name} is quantized by {method}, and transformers cannot read it here: {one_line(error)}", remedy)


def _adopt(loaded: Any, location: Location) -> None:
    """Give a model that was loaded from tensors what transformers takes from its folder: its name and generation settings."""
    from transformers import GenerationConfig

    loaded.config.name_or_path = loaded.name_or_path = str(location.path)
    if (location.path / "generation_config.json").is_file():
        loaded.generation_config = GenerationConfig.from_pretrained(location.path)


def _require_held(location: Location, config: Any, shards: SafetensorsSource | None) -> None:
    """Refuse a configuration of a larger model than the weight files hold: transformers would fill the rest at random.

    Raises:
        ModelError: it describes more numbers than there are in the files, or cannot be built.
        CheckpointError: its forms do not fit the model.
    """
    model = require_affordable(config, location.name)
    quantized = getattr(config, "quantization_config", None)
    if is_lrc(quantized):
        install_stored(model)
    elif quantized:
        return  # packed by a library that counts its numbers in its own way
    held = numbers_held(shards, location.path / (location.gguf or ""))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    wanted = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)
    if wanted > 2 * held + _FEW:  # of fewer, the loader names the tensor that is missing or does not fit
        raise ModelError(
            f"{location.name}: the model of config.json has {wanted:,} numbers, and the weight files hold {held:,}.",
            "Weights and config.json do not belong together, or the checkpoint is incomplete.",
        )


def is_lrc(stored: Any) -> bool:
    """Whether a `quantization_config` says that it is lrc's."""
    held = stored if isinstance(stored, dict) else vars(stored) if hasattr(stored, "__dict__") else {}
    return held.get("quant_method") == METHOD


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
