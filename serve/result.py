"""What an engine must know of a result before it reads a weight: its forms, and whether it can be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.hf_quantizer import LrcConfig, LrcQuantizer
from ..compress.forms.absent import ZERO
from ..compress.forms.base import Dense, LowRank, Spec, kinds_in
from ..compress.forms.product import Product
from ..compress.forms.pruned import Pruned
from ..compress.forms.quantized import Quantized, QuantizedLowRank
from ..errors import RequestError
from .matrices import Matrices

KINDS = (Dense.kind, LowRank.kind, Quantized.kind, QuantizedLowRank.kind, Product.kind, Pruned.kind, ZERO)
# Types whose layers engines fill by the rule of `shards`; others reorder rows or transpose while they load (GPT-2, GPT-NeoX).
MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
EXPORT = "`lrc export OUT --to dense` writes a checkpoint that every engine serves."


class Result:
    """The forms of a result, and which layers of an engine have taken them.

    Args:
        stored: the result's `quantization_config`.

    Raises:
        CheckpointError: it is none of lrc's, or a newer lrc wrote it.
        RequestError: it has forms that no engine multiplies by; the message counts them and names the first.
    """

    def __init__(self, stored: Mapping[str, Any]) -> None:
        config = LrcConfig(**{key: value for key, value in stored.items() if key != "quant_method"})
        LrcQuantizer(config).validate_environment()
        self.specs: dict[str, Spec] = config.modules
        self.extra_biases: list[str] = []
        self._waiting = set(self.specs)
        unknown: dict[str, list[str]] = {}
        for name, spec in self.specs.items():
            for kind in sorted(kinds_in(spec) - {*KINDS}):
                unknown.setdefault(kind, []).append(name)
        if unknown:
            listed = "\n".join(f"  - '{kind}': {len(of)} modules, {of[0]} first" for kind, of in sorted(unknown.items()))
            raise RequestError(f"No engine multiplies by these forms:\n{listed}", EXPORT)

    def rename(self, new_names: Mapping[str, str]) -> None:
        """Take the module paths of the engine's model, where they differ from the checkpoint's."""
        self.specs = {new_names.get(name, name): spec for name, spec in self.specs.items()}
        self._waiting = {new_names.get(name, name) for name in self._waiting}

    def below(self, prefix: str) -> list[str]:
        """The compressed modules at this path or below it."""
        return [name for name in self.specs if name == prefix or name.startswith(f"{prefix}.")]

    def matrices(
        self, names: Sequence[str], in_features: int, out_features: Sequence[int], dtype: torch.dtype, has_bias: bool
    ) -> Matrices:
        """The empty matrices of one layer of the engine.

        Args:
            names: module paths of the matrices that it fuses; one name with several `out_features` is fused in the checkpoint.
            in_features, out_features: of the layer.
            dtype: of the floating-point tensors.
            has_bias: whether the engine's layer keeps a bias of its own, so that the forms have none.

        Raises:
            CheckpointError: a form does not fit.
            RequestError: two forms use one tensor name in two ways, or a bias is where the layer does not look for it.
        """
        rows = [sum(out_features)] if len(names) == 1 else list(out_features)
        specs = [self._without_bias(name, has_bias) for name in names]
        for what, of in {
            "quantized factors are in some of them only": lambda spec: _inner(spec)["kind"] == Product.kind,
            "they keep different numbers of channels": lambda spec: spec.get("rows"),
        }.items():
            if len({of(spec) for spec in specs}) > 1:
                raise RequestError(f"'{names[0]}' and '{names[-1]}' are fused, and {what}.", EXPORT)
        made = Matrices(names, specs, in_features, rows, dtype)
        self._waiting.difference_update(names)
        self.extra_biases += [] if has_bias else [n for n, spec in zip(names, specs, strict=True) if _inner(spec).get("bias")]
        return made

    def _without_bias(self, name: str, has_bias: bool) -> Spec:
        spec = self.specs.get(name, {"kind": Dense.kind, "bias": has_bias})
        if not has_bias:
            return spec
        if not spec.get("bias"):
            raise RequestError(
                f"'{name}' is stored as '{spec['kind']}' without a bias under its own name, and the model's layer has one.",
                EXPORT,
            )
        return spec | {"bias": False}

    def require_taken(self) -> None:
        """Refuse to go on where the engine built no layer for a compressed module.

        Raises:
            RequestError: names the first.
        """
        if self._waiting:
            raise RequestError(
                f"The engine has no linear layer for {len(self._waiting)} compressed modules, {min(self._waiting)} first.",
                EXPORT,
            )


def _inner(spec: Spec) -> Spec:
    """The form of the rows and columns that are left of a pruned matrix; any other spec itself."""
    inner: Spec = spec["form"] if spec["kind"] == Pruned.kind else spec
    return inner


def require_served(model_type: str) -> None:
    """Refuse architectures that were not tested.

    Raises:
        RequestError: names it and those that were.
    """
    if model_type not in MODEL_TYPES:
        raise RequestError(
            f"Compressed results of the type '{model_type}' were not tested in an engine; tested: {', '.join(MODEL_TYPES)}.",
            EXPORT,
        )


def require_one_device(tensor_parallel: int, pipeline_parallel: int) -> None:
    """Refuse to share a layer, or the layers, among devices.

    Raises:
        RequestError: there is more than one.
    """
    if max(tensor_parallel, pipeline_parallel) > 1:
        raise RequestError(
            "A compressed result is served by one device; here the tensor parallel size is "
            f"{tensor_parallel} and the pipeline parallel size {pipeline_parallel}.",
            f"Leave both at 1. {EXPORT}",
        )


def shards(prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """The module paths that an engine's layer stands for: `x.qkv_proj` -> [`x.q_proj`, `x.k_proj`, `x.v_proj`].

    Args:
        prefix: the layer's path.
        fused: last part of a path -> those of the matrices that are fused in it.
    """
    parent, dot, leaf = prefix.rpartition(".")
    return [f"{parent}{dot}{part}" for part in fused.get(leaf, [leaf])]


def place_of(shard: Any) -> int:
    """The index of a matrix in its layer from what engines call it: 'q', 'k', 'v', a number, or None for the only one."""
    return 0 if shard is None else {"q": 0, "k": 1, "v": 2}.get(shard, shard)
