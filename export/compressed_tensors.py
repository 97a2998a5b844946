"""Codes in the `pack-quantized` format of the compressed-tensors library, corrections as an adapter of PEFT beside them.

When to use: for results of rtn, gptq, lqer, qera, caldera and other methods with codes, in transformers or vLLM without lrc.
vLLM has kernels for 4 and 8 bits; the library itself decodes 2 to 8.

Source: github.com/vllm-project/compressed-tensors, compressors/pack_quantized, version 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..compress.forms.grids import Grid, pack
from ..compress.forms.quantized import QuantizedLinear
from ..errors import RequestError
from .base import Drawing, Tensors, export_format
from .quantized import CodedFormat, codes_of, exact

_KERNELS = (4, 8)  # bits that vLLM has kernels for


@export_format(
    "compressed-tensors",
    about="codes of 2 to 8 bits in the published format, corrections as a PEFT adapter",
    opened_by="transformers and vLLM",
)
class CompressedTensors(CodedFormat):
    """The `pack-quantized` format."""

    @property
    def _decoded_at_load(self) -> bool:
        """Whether transformers must decode all codes when it loads; vLLM keeps them packed all the same.

        An adapter needs modules that PEFT knows; and transformers 5.23 expects unpacked zeros where it keeps codes packed.
        """
        return bool(self.result.ranks()) or any(not each.grid.symmetric for each in self.result.coded.values())

    @staticmethod
    def why_not(grid: Grid, rows: int, columns: int) -> str:
        if columns % grid.width(columns):
            return f"groups of {grid.width(columns)} do not divide {columns} inputs"
        return ""

    def draw(self) -> Drawing:
        """Say what the export will be.

        Raises:
            RequestError: several kinds of codes, which transformers would decode by the first kind; or a module that
                transformers builds otherwise where it reads this format.
        """
        _require_no_other_modules(self.result.multiplied.model)
        grids = {each.grid for each in self.result.coded.values()}
        if self._decoded_at_load and len(grids) > 1:
            raise RequestError(
                f"This result has {len(grids)} kinds of codes ({', '.join(sorted(map(_said, grids)))}). With corrections or "
                "with zeros, transformers decodes all codes when it loads, and by the first kind alone.",
                "The formats 'dense' and 'self-contained' carry this result.",
            )
        coded, element = self.result.coded, self.dtype.itemsize
        nbytes = self.result.dense_nbytes(self.dtype)
        for each in coded.values():
            groups = each.grid.groups(each.columns)
            nbytes += 4 * each.rows * _words(each.columns, each.grid.bits) + each.rows * groups * element + 16
            nbytes += 0 if each.grid.symmetric else 4 * _words(each.rows, each.grid.bits) * groups
        ranks = self.result.ranks()
        nbytes += self.adapter_nbytes()
        unusual = sorted({each.grid.bits for each in coded.values()} - set(_KERNELS))
        lost = self.result.lost + self.replaced
        if unusual:
            lost += (f"vLLM has no kernels for {' and '.join(map(str, unusual))} bits; transformers opens them.",)
        if self._decoded_at_load:
            lost += ("transformers decodes the codes when it loads, so the model takes dense memory there; vLLM does not.",)
        if any(each.grid.kind == "mxint" for each in coded.values()):
            lost += (f"Steps that are powers of two take {element} bytes here instead of one.",)
        return Drawing(nbytes, lost, ("transformers", "compressed-tensors", *(["peft"] if ranks else [])))

    def encoded(self, path: str, module: QuantizedLinear) -> Tensors:
        grid, (codes, steps, zeros) = module.grid, codes_of(module)
        tensors = {
            "weight_packed": packed_words(codes, grid.bits),
            "weight_scale": exact(path, steps, self.dtype).contiguous(),
            "weight_shape": torch.tensor(codes.shape),
        }
        if zeros is not None:
            tensors["weight_zero_point"] = packed_words(zeros.T.contiguous(), grid.bits).T.contiguous()
        return tensors

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        by_grid: dict[Grid, list[str]] = {}
        for path, each in self.result.coded.items():
            by_grid.setdefault(each.grid, []).append(path)
        linear = (name for name, module in self.result.multiplied.model.named_modules() if type(module) is torch.nn.Linear)
        quantization: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{n}": _group(grid, paths) for n, (grid, paths) in enumerate(by_grid.items())},
            "ignore": [name for name in linear if name not in self.result.coded],
            "kv_cache_scheme": None,
        }
        if self._decoded_at_load:
            quantization["dequantize"] = True
        config = self.result.multiplied.config
        return config | {"dtype": str(self.dtype).removeprefix("torch."), "quantization_config": quantization}


def _require_no_other_modules(model: Any) -> None:
    """Refuse a model whose modules transformers replaces by others for this format: they store their tensors otherwise."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    table: Mapping[str, Any] = MODULES_TO_PATCH_FOR_QUANTIZATION
    patched = {
        name
        for name, patch in table.items()
        if "compressed-tensors" in {str(getattr(method, "value", method)) for method in patch["quantization_methods"]}
    }
    if found := [path for path, module in model.named_modules() if type(module).__name__ in patched]:
        raise RequestError(
            f"The format 'compressed-tensors' cannot carry this model: transformers replaces {len(found)} modules where it "
            f"reads that format, {found[0]} ({type(model.get_submodule(found[0])).__name__}) first.",
            "The formats 'dense', 'self-contained' and 'gptq' carry it.",
        )


def _said(grid: Grid) -> str:
    return f"{grid.bits} bits in groups of {grid.group_size or 'a row'}{'' if grid.symmetric else ' with zeros'}"


def _group(grid: Grid, paths: list[str]) -> dict[str, Any]:
    whole_row = grid.group_size == 0
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else grid.group_size,
        "dynamic": False,
    }
    return {"targets": paths, "weights": weights, "format": "pack-quantized"}


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, n) uint8 -> (rows, ⌈n·bits/32⌉) int32, least significant bit first, each row padded to whole words."""
    packed = pack(codes, bits)
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return padded.view(torch.int32)
