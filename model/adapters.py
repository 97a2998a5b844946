"""Adapters of PEFT on compressed modules.

PEFT wraps `nn.Linear` and the modules of libraries that it knows. For others it has a mapping in its configuration, which
`lora_config` fills in:

    config = lrc.lora_config(LoraConfig(target_modules=["q_proj"], r=8))
    model = get_peft_model(model, config)
    PeftModel.from_pretrained(model, "ADAPTER", config=lrc.lora_config(LoraConfig.from_pretrained("ADAPTER")))

The adapter's product is added to that of the compressed module, so it is trained, saved and loaded as on any other model. It
cannot be merged: the sum has neither the rank nor the codes of the form.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..compress import forms
from ..compress.registry import import_all
from ..errors import ModelError, RequestError


def lora_config(config: Any) -> Any:
    """Tell a `LoraConfig` of PEFT about the modules of lrc's forms; the same configuration is returned.

    Raises:
        RequestError: it is no LoraConfig, or asks for an initialisation that needs the dense matrix.
    """
    if not hasattr(config, "_register_custom_module"):
        raise RequestError(f"A {type(config).__name__} knows no modules but PEFT's own.", "Give a LoraConfig of peft.")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "eva"):
        raise RequestError(
            f"init_lora_weights='{config.init_lora_weights}' needs the dense matrix, and a compressed module has none.",
            "Give True or 'gaussian', or multiply the model out first: model.dequantize().",
        )
    config._register_custom_module(dict.fromkeys(_modules(), _wrapper()))
    return config


def _modules() -> list[type[nn.Module]]:
    """The modules of all forms."""
    import_all(forms.__name__)
    waiting, found = [nn.Module], []
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.startswith(f"{forms.__name__}."):
                found.append(kind)
    return list(dict.fromkeys(found))


@functools.cache
def _wrapper() -> type[nn.Module]:
    from peft.tuners.lora.layer import Linear

    class LoraForm(Linear):  # type: ignore[misc, valid-type, unused-ignore]
        """A compressed module and an adapter beside it."""

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        @property
        def lora_variants(self) -> dict[tuple[str, ...], None]:
            return {(): None}  # DoRA and its like scale by the norms of the dense matrix

        def merge(self, *_: Any, **__: Any) -> None:
            raise ModelError(
                f"An adapter cannot be merged into a {type(self.get_base_layer()).__name__}: the sum has no such form.",
                "Keep the adapter beside the model; or call model.dequantize() before you attach it, and merge then.",
            )

    return LoraForm
