"""Codes in the GPTQ checkpoint format, corrections as an adapter of PEFT beside them.

When to use: for results with codes of 2, 3, 4 or 8 bits in GPTQModel, SGLang, transformers with GPTQModel, or vLLM (which reads
4 and 8 bits without zeros). Symmetric codes are written as version 1 of the format, which every reader knows; codes with zeros
as version 2, because version 1 stores a zero less one and has no place for a zero of 0.

Source: github.com/ModelCloud/GPTQModel, nn_modules/qlinear, version 7.7.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ..compress.forms.grids import Grid
from ..compress.forms.quantized import QuantizedLinear
from .adapter import WEIGHTS
from .base import Drawing, Tensors, export_format
from .compressed_tensors import packed_words
from .quantized import CodedFormat, codes_of, exact

_BITS = (2, 3, 4, 8)
_WORD = 32


@export_format(
    "gptq",
    about="codes of 2, 3, 4 or 8 bits in GPTQ's format, corrections as a PEFT adapter",
    opened_by="GPTQModel, transformers with GPTQModel, SGLang; vLLM 4 and 8 bits without zeros",
)
class Gptq(CodedFormat):
    """The GPTQ format, version 1 or 2."""

    @property
    def _version(self) -> str:
        return "gptq" if all(each.grid.symmetric for each in self.result.coded.values()) else "gptq_v2"

    @staticmethod
    def why_not(grid: Grid, rows: int, columns: int) -> str:
        if grid.bits not in _BITS:
            return f"{grid.bits} bits"
        if rows % _WORD or columns % _WORD:
            return f"a matrix of {rows} x {columns}, whose sides are no multiples of {_WORD}"
        if columns % grid.width(columns):
            return f"groups of {grid.width(columns)} do not divide {columns} inputs"
        return ""

    def draw(self) -> Drawing:
        """Say what the export will be."""
        coded, element = self.result.coded, self.dtype.itemsize
        nbytes = self.result.dense_nbytes(self.dtype)
        for each in coded.values():
            groups = each.grid.groups(each.columns)
            nbytes += each.numel * each.grid.bits // 8 + groups * each.rows * element
            nbytes += groups * each.rows * each.grid.bits // 8 + 4 * each.columns
        ranks = self.result.ranks()
        nbytes += self.adapter_nbytes()
        lost = self.result.lost + self.replaced
        if self._version == "gptq_v2":
            lost += ("The codes have zeros, so this is version 2 of the format; readers that know version 1 alone refuse it.",)
        return Drawing(nbytes, lost, ("transformers", "gptqmodel", "optimum", *(["peft"] if ranks else [])))

    def encoded(self, path: str, module: QuantizedLinear) -> Tensors:
        grid, (codes, steps, zeros) = module.grid, codes_of(module)
        if zeros is None:
            zeros = torch.full(steps.shape, grid.middle, dtype=torch.uint8)
        stored = zeros if self._version == "gptq_v2" else zeros - 1
        return {
            "qweight": packed_words(codes, grid.bits).T.contiguous(),
            "qzeros": packed_words(stored.T.contiguous(), grid.bits),
            "scales": exact(path, steps, self.dtype).T.contiguous(),
            "g_idx": (torch.arange(codes.shape[1]) // grid.width(codes.shape[1])).int(),
        }

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        coded = self.result.coded
        (usual, _), *_ = Counter(each.grid for each in coded.values()).most_common(1)
        linear = [name for name, module in self.result.multiplied.model.named_modules() if type(module) is torch.nn.Linear]
        layers = self.source.view.layers_path + "."
        dynamic: dict[str, dict[str, int]] = {
            f"-:^{re.escape(name)}$": {} for name in linear if name not in coded and name.startswith(layers)
        }
        for path, each in coded.items():
            if each.grid != usual:
                dynamic[f"+:^{re.escape(path)}$"] = {"bits": each.grid.bits, "group_size": _group(each.grid)}
        quantization: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": usual.bits,
            "group_size": _group(usual),
            "sym": usual.symmetric,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": self._version,
            "format": self._version,
            "pack_dtype": "int32",
        }
        if dynamic:
            quantization["dynamic"] = dynamic
        inside = {path.removeprefix(layers).partition(".")[2] for path in coded}
        quantization["modules_in_block_to_quantize"] = [sorted(inside)]
        config = self.result.multiplied.config
        return config | {"dtype": str(self.dtype).removeprefix("torch."), "quantization_config": quantization}

    @property
    def checked_with(self) -> tuple[str, ...]:
        """No package: see `open`."""
        return ()

    def open(self, folder: str) -> Any:
        """A model of transformers with the codes decoded by the format's own formula.

        GPTQModel is not asked: it builds its kernels for one machine when it is installed, and few machines have it.
        """
        tensors = {name: t for file in sorted(Path(folder).glob("model*.safetensors")) for name, t in load_file(file).items()}
        after = 1 if self._version == "gptq" else 0
        state: Tensors = {name: t.float() for name, t in tensors.items() if not name.endswith(_PARTS)}
        for path, each in self.result.coded.items():
            held = {part: tensors[f"{path}.{part}"] for part in _PARTS}
            codes = _bits(held["qweight"].numpy().T, each.grid.bits, each.columns)
            zeros = _bits(held["qzeros"].numpy(), each.grid.bits, each.rows) + after
            group = held["g_idx"].numpy()
            scales = held["scales"].float().numpy()
            weight = (codes.astype(np.float32) - zeros[group].T) * scales[group].T
            state[f"{path}.weight"] = torch.from_numpy(weight)
        if (adapter := Path(folder) / WEIGHTS).exists():
            factors = load_file(adapter)
            for path in self.result.ranks():
                a, b = (factors[f"base_model.model.{path}.lora_{side}.weight"].float() for side in "AB")
                state[f"{path}.weight"] += b @ a
        model = type(self.source.view.model)._from_config(self.source.view.config.from_dict(self.result.multiplied.config))
        model.float().load_state_dict(state, strict=False)
        model.tie_weights()
        return model


_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _group(grid: Grid) -> int:
    return grid.group_size or -1


def _bits(words: Any, bits: int, count: int) -> Any:
    """Codes (rows, count) of words (rows, n) int32, least significant bit first; by single bits, unlike the packing."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
    return (stream.reshape(len(words), count, bits) << np.arange(bits)).sum(2)
