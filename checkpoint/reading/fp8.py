"""Weights in 8-bit floating point (fp8), read with their scales into 16 bit; other quantized checkpoints are refused by name.

A weight is `stored * scale`, whatever the scale is called: `weight_scale_inv` in checkpoints of DeepSeek and Qwen,
`weight_scale` in those of compressed-tensors, ModelOpt and fbgemm. There is one scale per tensor, per row, or per block. The
product is computed in float32 and rounded once, which gives the bits that `Fp8Dequantize` of transformers 5.23 gives. Scales
of activations and of the key-value cache belong to a forward pass in fp8; the result computes in 16 bit and has none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ModelError, one_line
from .fingerprint import Tell
from .weights import SafetensorsSource
from .which import declared_quantization, quantization_method

MODELOPT = "hf_quant_config.json"
_MODELOPT_BYTES = 1 << 24
ACTIVATION_SCALES = (
    "input_scale",
    "activation_scale",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
    "input_scale_ub",
)
_STORED = ("F8_E4M3", "F8_E5M2")
_NUMBERS = ("F64", "F32", "BF16", "F16", *_STORED)
_ORIGINAL = "Give the 16-bit original instead."
_TOGETHER = 512  # tensors of scales that are read at a time
# endings of tensors' names -> what quantized them, for checkpoints that declare nothing
_TRACES = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors, packed",
    ".weight_scale_2": "NVFP4",
    "_blocks": "MXFP4",
    ".SCB": "bitsandbytes, 8 bit",
    ".absmax": "bitsandbytes, 4 bit",
}


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint says that it is quantized.

    Args:
        method: its name, for messages.
        fp8: whether lrc reads it.
        block: rows and columns of the blocks that share a scale; None if it is not said.
        exponents: whether uint8 scales are exponents of two (ue8m0).
    """

    method: str
    fp8: bool = False
    block: tuple[int, int] | None = None
    exponents: bool = False


def quantization_of(folder: Path, config: Any) -> Quantization | None:
    """What config.json, or else ModelOpt's hf_quant_config.json, says about quantized weights; None if nothing.

    Raises:
        ModelError: hf_quant_config.json cannot be read.
    """
    method = quantization_method(config)
    if method is not None:
        return _from_config(method, declared_quantization(config))
    path = folder / MODELOPT
    if not path.is_file():
        return None
    try:
        if (size := path.stat().st_size) > _MODELOPT_BYTES:
            raise ValueError(f"it has {size} bytes; {_MODELOPT_BYTES} are the most that lrc reads")
        held = json.loads(path.read_bytes())["quantization"]
        algorithm = held.get("quant_algo")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}", "Get it again, or remove it.") from error
    return None if algorithm is None else _modelopt(algorithm)  # none: only the key-value cache is to be rounded


def _from_config(method: str, declared: Mapping[str, Any]) -> Quantization:
    if method in ("fp8", "mxfp8", "fbgemm_fp8"):
        exponents = method == "mxfp8" or declared.get("scale_fmt") == "ue8m0"
        return Quantization(method, True, _block(declared.get("weight_block_size")), exponents)
    if method == "modelopt":
        return _modelopt(declared.get("quant_algo"))
    if method == "compressed-tensors":
        return _compressed_tensors(declared)
    return Quantization(method)


def _modelopt(algorithm: Any) -> Quantization:
    return Quantization(f"ModelOpt {algorithm}", str(algorithm).upper().startswith("FP8"))


def _compressed_tensors(declared: Mapping[str, Any]) -> Quantization:
    """compressed-tensors: fp8 if every group's weights are symmetric 8-bit floats and nothing else is done to them."""
    groups = declared.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") if isinstance(group, Mapping) else None for group in found]
    stored = declared.get("format")
    name = f"compressed-tensors, {stored}"
    if declared.get("transform_config"):
        return Quantization(f"{name}, with rotated weights")
    sparse = declared.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        return Quantization(f"{name}, sparse")
    plain = bool(weights) and all(
        isinstance(each, Mapping) and each.get("type") == "float" and each.get("num_bits") == 8 and each.get("symmetric", True)
        for each in weights
    )
    blocks = {_block(each.get("block_structure")) for each in weights if isinstance(each, Mapping)}
    return Quantization(name, plain, blocks.pop() if len(blocks) == 1 else None)


def _block(said: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, from [128, 128] or '128x128'; None if it is neither."""
    parts = said.split("x") if isinstance(said, str) else said
    try:
        rows, columns = (int(part) for part in parts)
    except (TypeError, ValueError):
        return None
    return (rows, columns) if rows > 0 and columns > 0 else None


def open_weights(folder: Path, config: Any, name: str, dtype: torch.dtype | None = None) -> SafetensorsSource:
    """The weights of an ordinary or an fp8 checkpoint; fp8 is read into 16 bit.

    Args:
        folder: the checkpoint.
        config: its transformers configuration.
        name: the model as the user wrote it.
        dtype: that fp8 is read into; None takes config.json's, or bfloat16 if that names none.

    Raises:
        ModelError: the weights are quantized in a way that lrc does not read, or an fp8 tensor has no scale that fits.
        CheckpointError: a file is missing or damaged, or a scale is zero, negative or not finite.
    """
    said = quantization_of(folder, config)
    if said is not None and not said.fp8:
        remedy = "Give the original model instead." if said.method == "lrc" else _ORIGINAL
        raise ModelError(f"{name} is compressed already (quant_method: {said.method}).", remedy)
    plain = SafetensorsSource(folder, config)
    names = plain.names()
    eight = [each for each in names if plain.stored_dtype(each) in _STORED]
    if not eight:
        if said is None and (trace := _trace(names)):
            raise ModelError(f"{name} is compressed already ({trace}).", _ORIGINAL)
        return plain
    return Fp8Source(folder, config, name, sixteen_bit(dtype, config, name), said or Quantization("fp8", True))


def sixteen_bit(dtype: torch.dtype | None, config: Any, name: str) -> torch.dtype:
    """The dtype that fp8 weights are read into.

    Raises:
        ModelError: config.json says float32 and nothing of fp8, and nobody asked for a dtype.
    """
    if dtype is not None:
        return dtype
    said = getattr(config, "dtype", None)
    if said in (torch.float32, torch.float64):
        if quantization_method(config) is not None:
            return said  # as transformers does
        raise ModelError(
            f"{name} holds fp8 weights, which are read into 16 bit, and config.json says {str(said).removeprefix('torch.')} "
            "and nothing of fp8.",
            "Say which: --dtype bfloat16 or --dtype float16 (or --dtype float32, four times the bytes).",
        )
    return said if said in (torch.bfloat16, torch.float16) else torch.bfloat16


def without_quantization(config: Any) -> None:
    """Take `quantization_config` out of a configuration and its text part: the model in memory is not quantized."""
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config


def require_numbers(source: Any, names: Iterable[str], model: str) -> None:
    """Refuse weights that are stored as integers, packed bits or a float format that lrc does not read.

    Raises:
        ModelError: the message names the first of them and its dtype.
    """
    for name in names:
        stored = source.stored_dtype(name)
        if stored is not None and stored not in _NUMBERS:
            raise ModelError(f"{model} is quantized: '{name}' is stored as {stored}, which lrc does not read.", _ORIGINAL)


def _trace(names: Iterable[str]) -> str:
    return next((f"'{name}' looks like {what}" for name in names for end, what in _TRACES.items() if name.endswith(end)), "")


class Fp8Source(SafetensorsSource):
    """A checkpoint with fp8 weights: each is read with its scale into 16 bit, one tensor at a time.

    Args:
        folder: the checkpoint.
        config: its transformers configuration.
        model: the model as the user wrote it, for messages.
        dtype: that the weights are read into.
        said: how the checkpoint is quantized.

    Raises:
        ModelError: an fp8 tensor has no scale, or one of a shape that does not fit.
        CheckpointError: a file is missing or damaged, or a scale is zero, negative or not finite.
    """

    def __init__(self, folder: Path, config: Any, model: str, dtype: torch.dtype, said: Quantization) -> None:
        super().__init__(folder, config)
        self._model, self._into, self._said = model, dtype, said
        every = set(self._where)
        self.fp8 = [name for name in self._where if self._dtypes[name] in _STORED]
        self._scales = {name: self._scale_of(name, every) for name in self.fp8}
        self._blocks = {name: self._blocks_of(name) for name in self.fp8}
        used = set(self._scales.values())
        self._names = [name for name in self._where if name not in used]
        self._check_scales()

    def names(self) -> list[str]:
        return self._names

    @property
    def activation_scales(self) -> list[str]:
        """Tensors that only a forward pass in fp8 needs."""
        return [name for name in self._names if name.rpartition(".")[2].endswith(ACTIVATION_SCALES)]

    @property
    def dtype(self) -> torch.dtype:
        return self._into

    def fingerprint(self, tell: Tell = lambda done, total: None) -> str:
        """The files', and how their scales are meant: another size of blocks in config.json makes another model."""
        return hashlib.sha256(f"{super().fingerprint(tell)} {self._said.block} {self._said.exponents}".encode()).hexdigest()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors; fp8 weights in the dtype that they are read into.

        Raises:
            CheckpointError: a file is damaged, or a weight does not fit into that dtype.
        """
        wanted = list(names)
        tensors = super().read([name for name in wanted if name not in self._scales])
        for name in (name for name in wanted if name in self._scales):
            scale = self._scales[name]
            held = super().read([name, scale])
            stored = held[name].to(torch.float32)
            tensors[name] = descaled(stored, self._numbers(held[scale]), self._blocks[name]).to(self._into)
            self._check_range(name, stored, tensors[name])
        return {name: tensors[name] for name in wanted}

    def equal(self, first: str, second: str, dtype: torch.dtype) -> bool:
        if first in self._scales or second in self._scales:
            held = self.read([first, second])
            return torch.equal(held[first].to(dtype), held[second].to(dtype))
        return super().equal(first, second, dtype)

    def _scale_of(self, name: str, every: set[str]) -> str:
        """The name of the scale of an fp8 tensor: of a module's `weight`, or of a parameter with another name."""
        stem = name.removesuffix("weight")
        candidates = [f"{name}_scale_inv", f"{name}_scale"]
        candidates += [f"{stem}scale", f"{stem}scale_inv", f"{stem}qscale_weight"] if name.endswith(".weight") else []
        found = [each for each in candidates if each in every]
        if not found:
            raise ModelError(
                f"{self._model}: '{name}' is stored in fp8 and has no scale ('{candidates[0]}' or '{candidates[1]}').",
                "The checkpoint is incomplete, or its scales have names that lrc does not know. " + _ORIGINAL,
            )
        if zero := next((each for each in (f"{name}_zero_point",) if each in every), None):
            raise ModelError(f"{self._model}: '{zero}' makes '{name}' asymmetric, which lrc does not read.", _ORIGINAL)
        if len(found) > 1:
            raise ModelError(f"{self._model}: '{name}' has two scales, '{found[0]}' and '{found[1]}'.", _ORIGINAL)
        return found[0]

    def _blocks_of(self, name: str) -> tuple[int, ...]:
        shape, scale = self._shapes[name], self._shapes[self._scales[name]]
        blocks = scale_blocks(shape, scale, self._said.block)
        if blocks is None:
            declared = f" with blocks of {self._said.block}" if self._said.block else ""
            raise ModelError(
                f"{self._model}: '{name}' has shape {shape} and its scale '{self._scales[name]}' {scale}, which do not fit "
                f"each other{declared}.",
                "The checkpoint is damaged, or has a layout of scales that lrc does not know. " + _ORIGINAL,
            )
        return blocks

    def _check_scales(self) -> None:
        names = sorted(set(self._scales.values()))
        for start in range(0, len(names), _TOGETHER):
            for name, scale in super().read(names[start : start + _TOGETHER]).items():
                values = self._numbers(scale)
                bad = int((~((values > 0) & torch.isfinite(values))).sum())
                if bad:
                    raise CheckpointError(
                        f"{self._model}: {bad} of {values.numel()} scales in '{name}' are zero, negative or not finite.",
                        "The checkpoint is damaged; get it again.",
                    )

    def _numbers(self, scale: Tensor) -> Tensor:
        """A scale in float32; bytes are exponents of two where the checkpoint says so."""
        if scale.dtype != torch.uint8:
            return scale.to(torch.float32)
        if not self._said.exponents:
            raise ModelError(
                f"{self._model}: scales are stored as bytes, and config.json does not say scale_fmt ue8m0.", _ORIGINAL
            )
        return torch.exp2(scale.to(torch.float32) - 127)

    def _check_range(self, name: str, stored: Tensor, weight: Tensor) -> None:
        if not torch.isfinite(weight).all() and torch.isfinite(stored).all():
            raise CheckpointError(
                f"{self._model}: '{name}' times its scale does not fit into {str(self._into).removeprefix('torch.')}.",
                "Give --dtype bfloat16 or float32.",
            )


def scale_blocks(weight: tuple[int, ...], scale: tuple[int, ...], declared: tuple[int, int] | None) -> tuple[int, ...] | None:
    """How many numbers along each dimension of a weight share one scale; None if the shapes do not fit each other.

    The last block of a dimension may be cut off. If the size of the blocks is not declared, it is the power of two that gives
    this number of blocks, which is unique for two blocks and more, or else an exact divisor.

    Args:
        weight: shape of the weight: (out, in), or (experts, a, b).
        scale: shape of the scale: one number, one per row (out,) or expert (experts,), or as many dimensions as the weight.
        declared: rows and columns of a block; None if not said.
    """
    if math.prod(scale) == 1:
        return weight
    if len(scale) == 1 and len(weight) > 1:
        if scale[0] != (weight[0] if len(weight) == 3 else weight[-2]):
            return None
        scale = (*scale, *(1 for _ in weight[1:]))
    if len(scale) != len(weight):
        return None
    said = (*(None for _ in weight[2:]), *declared) if declared is not None and len(weight) > 1 else (None,) * len(weight)
    found = (_block_of(*each) for each in zip(weight, scale, said, strict=True))
    blocks = tuple(block for block in found if block is not None)
    partial = [block not in (1, size) for block, size in zip(blocks, weight, strict=False)]
    return None if len(blocks) < len(weight) or any(partial[:-2]) or (len(weight) == 1 and any(partial)) else blocks


def _block_of(size: int, count: int, declared: int | None) -> int | None:
    if count == 1:
        return size
    if count == size:
        return 1
    if declared is not None:
        return declared if -(-size // declared) == count else None
    if not 1 < count < size:
        return None
    power = 1 << (-(-size // count) - 1).bit_length()  # the smallest power of two that is no smaller than size / count
    if -(-size // power) == count:
        return power
    return size // count if size % count == 0 else None


def descaled(values: Tensor, scale: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """The product of a weight and its scales, in float32.

    Args:
        values: the weight as float32; it is not changed.
        scale: float32, of a shape that `scale_blocks` accepts.
        blocks: from `scale_blocks`.
    """
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.ndim < values.ndim:
        scale = scale.reshape(*scale.shape, *(1 for _ in values.shape[1:]))
    if all(block in (1, size) for block, size in zip(blocks, values.shape, strict=True)):
        return values * scale
    rows, columns = blocks[-2:]
    result = torch.empty_like(values)
    for number in range(scale.shape[-2]):  # one row of blocks at a time: no scale for every number is in memory
        own = slice(number * rows, (number + 1) * rows)
        wide = scale[..., number, :].repeat_interleave(columns, -1)[..., None, : values.shape[-1]]
        torch.mul(values[..., own, :], wide, out=result[..., own, :])
    return result
