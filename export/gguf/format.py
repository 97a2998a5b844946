"""One GGUF file for llama.cpp, Ollama and what is built on them.

When to use: to run a result on a laptop or a phone. Codes become GGUF's block types as they are where a type holds them;
everything else is a dense matrix in the dtype of the export. Low-rank corrections are a LoRA file beside the model. A result of
low rank alone has no place in GGUF, so its factors are multiplied out; quantize that file with `llama-quantize`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compress.forms.grids import Grid
from ...errors import CheckpointError, RequestError
from ...model.events import Event, Notify
from ..base import LOADING, Carried, Drawing, Format, Tensors, export_format
from ..multiplied import Multiplied
from ..quantized import QuantizedResult, codes_of, factors_of
from ..source import Source
from . import architectures, blocks
from .architectures import ARCHITECTURES, Names, unplaced
from .placed import Place, Placed
from .vocabulary import add_vocabulary

_TEXTS = (
    "Hello, world! It's 2024, isn't it?",
    "  two  spaces\n\nand lines\t 12345 3.14",
    "naïve café — 漢字 и кириллица 🙂",
    "def f(x):\n    return x**2  # comment",
)
_PREFIXES = (1, 5, 17)  # tokens before the compared position


@export_format(
    "gguf",
    about="one GGUF file, codes as block types, corrections as a LoRA file",
    opened_by="llama.cpp, Ollama, LM Studio and others on llama.cpp",
)
class Gguf(Format):
    """The GGUF format."""

    copies = False

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._require_known(source)
        try:
            self.coded: QuantizedResult | None = QuantizedResult(source, self.name, blocks.why_not)
            self.multiplied = self.coded.multiplied
        except RequestError:  # nothing can stay in codes; what has no place at all is refused here
            self.coded, self.multiplied = None, Multiplied(source, self.name)
        self.names = Names(self.multiplied.model)
        missing = unplaced(self.multiplied.model, self.names.of, set(source.view.tied))
        carried = Carried(dict.fromkeys(missing, "llama.cpp has no tensor of this kind in this architecture"))
        carried.require(self.name, "The formats 'dense' and 'self-contained' carry every result.")
        self._factors: Tensors = {}
        super().__init__(source, dtype)

    def _require_known(self, source: Source) -> None:
        reasons = architectures.why_not(source.view.config.get_text_config())
        if source.view.config.get_text_config() is not source.view.config:
            reasons = ["a model of text and other inputs"]
        if reasons:
            raise RequestError(
                f"llama.cpp would not compute what this model computes, because it has {'; '.join(reasons)}.",
                "Export to 'dense', and try llama.cpp's own convert_hf_to_gguf.py on that.",
            )

    @cached_property
    def tokenizer(self) -> Any:
        """The result's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source.folder, trust_remote_code=False)

    def _grid(self, path: str) -> Grid | None:
        return self.coded.coded[path].grid if self.coded and path in self.coded.coded else None

    def draw(self) -> Drawing:
        """Say what the export will be."""
        again = Counter[str]()
        for each in self.coded.coded.values() if self.coded else ():
            if not blocks.is_exact(each.grid):
                again[f"{each.grid.bits}-bit codes with zeros are quantized again, to {blocks.block_type(each.grid).name}"] += 1
        lost = [f"{count} modules: {reason}." for reason, count in again.items()]
        if self.coded:
            lost += self.coded.lost
        elif self.source.specs:
            lost.append("Every matrix is multiplied out; `llama-quantize FILE OUT Q4_K_M` makes that file smaller.")
        nbytes = sum(place.nbytes for place in self.places.values()) + (self._lora_nbytes() if self.coded else 0)
        return Drawing(nbytes, tuple(lost), ("xllamacpp",))

    @cached_property
    def places(self) -> dict[str, Place]:
        """Name in the file -> what it holds, known before any tensor is read."""
        import gguf

        computed = architectures.computed(self.multiplied.model)
        found = {name: Place(tuple(tensor.shape), None, tensor.nbytes) for name, tensor in computed.items()}
        for name, tensor in self.multiplied.state.items():
            if name in self.source.view.tied:
                continue
            grid = self._grid(name.removesuffix(".weight")) if name.endswith(".weight") else None
            for target, part in self.names.arranged(name, tensor):
                kind = blocks.block_type(grid) if grid else self._dense_type(part)
                block, size = gguf.GGML_QUANT_SIZES[kind]
                found[target] = Place(tuple(part.shape), kind, part.numel() // block * size)
        return found

    def _dense_type(self, tensor: Tensor) -> Any:
        """Float32 for norms and biases, which llama.cpp demands; the dtype of the export for matrices."""
        from gguf import GGMLQuantizationType as Type

        kinds = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
        return Type.F32 if tensor.ndim < 2 else kinds[self.dtype]

    def _lora_nbytes(self) -> int:
        assert self.coded is not None
        return sum(each.rank * (each.rows + each.columns) * 4 for each in self.coded.coded.values())

    @property
    def file(self) -> str:
        """The name of the model's file."""
        return f"{self.source.folder.resolve().name}.gguf"

    @property
    def lora_file(self) -> str:
        """The name of the file of corrections."""
        return f"{self.source.folder.resolve().name}-lora.gguf"

    def parts(self) -> Iterator[Tensors]:
        """Not used: GGUF is one file with blocks that are no tensors of torch."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Nothing: the settings are in the file."""
        return {}

    def write(self, folder: Path, notify: Notify) -> bool:
        """Write the model, each tensor to its place as it is made, and its corrections beside it."""
        import gguf

        writer = gguf.GGUFWriter(folder / self.file, ARCHITECTURES[self.names.config.model_type].name)
        embedding = self.multiplied.model.get_input_embeddings().weight.shape[0]
        writer.add_name(self.source.folder.resolve().name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(self._file_type())
        architectures.describe(writer, self.names.config, embedding)
        add_vocabulary(writer, self.tokenizer, embedding)
        with Placed(writer, self.places) as placed:
            for name, tensor in architectures.computed(self.multiplied.model).items():
                placed.put(name, tensor.numpy())
            for number, part in enumerate(self._parts(), 1):
                for name, array in part.items():
                    placed.put(name, array)
                notify(Event("export", done=number))
        if self._factors:
            self._write_lora(folder / self.lora_file)
        return True

    def _file_type(self) -> int:
        import gguf

        dense = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}[self.dtype]
        kinds = Counter(blocks.block_type(each.grid).name for each in self.coded.coded.values()) if self.coded else {}
        name = f"MOSTLY_{max(kinds, key=lambda kind: kinds[kind])}" if kinds else dense
        return int(gguf.LlamaFileType[name])

    def _parts(self) -> Iterator[dict[str, Any]]:
        """Name in the file -> array, a layer at a time."""
        coded: dict[str, Any] = {}
        paths = self.coded.coded if self.coded else {}
        for part in self.multiplied.parts(torch.float32, paths, lambda path: self._encode(path, coded)):
            found = dict(coded)
            coded.clear()
            for name, tensor in part.items():
                for target, arranged in self.names.arranged(name, tensor):
                    found[target] = self._dense(arranged)
            yield found

    def _encode(self, path: str, coded: dict[str, Any]) -> Tensors:
        """Put a module's blocks into `coded`; its bias is an ordinary tensor."""
        assert self.coded is not None
        module: Any = self.source.view.model.get_submodule(path)
        rows = self.names.rows(f"{path}.weight")
        order = slice(None) if rows is None else rows
        codes, steps, zeros = codes_of(module)
        kept = (codes[order], steps[order], None if zeros is None else zeros[order])
        (name,) = self.names.of(f"{path}.weight")
        coded[name] = blocks.encoded(path, self.coded.coded[path].grid, *kept)
        if self.coded.coded[path].rank:
            left, right = factors_of(module.correction)
            self._factors[f"{name}.lora_a"], self._factors[f"{name}.lora_b"] = right.contiguous(), left[order].contiguous()
        return {} if module.bias is None else {f"{path}.bias": module.bias.detach().float()}

    def _dense(self, tensor: Tensor) -> Any:
        import gguf

        array, kind = tensor.contiguous().numpy(), self._dense_type(tensor)
        if kind == gguf.GGMLQuantizationType.F16 and not torch.isfinite(tensor.half()).all():
            raise CheckpointError("A weight has no value in float16.", "Export with --dtype bfloat16 or float32.")
        return gguf.quants.quantize(array, kind)

    def _write_lora(self, path: Path) -> None:
        import gguf

        writer = gguf.GGUFWriter(path, ARCHITECTURES[self.names.config.model_type].name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # 0: factors are not scaled, whatever their rank
        places = {name: Place(tuple(tensor.shape), None, tensor.nbytes) for name, tensor in self._factors.items()}
        with Placed(writer, places) as placed:
            for name, tensor in self._factors.items():
                placed.put(name, tensor.numpy())

    def loading(self) -> str:
        """The section of the model card about loading: how llama.cpp runs the export."""
        lora = f" --lora {self.lora_file}" if self.coded and self.coded.ranks() else ""
        return f"{LOADING}\n\n```\nllama-cli -m {self.file}{lora}\n```"

    def difference(self, folder: Path, ids: Tensor, expected: Tensor) -> float:
        """Of log probabilities after several prompts, as llama.cpp computes them; tokens of texts are compared too.

        Raises:
            CheckpointError: llama.cpp does not open the file, or splits a text into other tokens.
        """
        answer = self._asked(folder, [ids[0, :length].tolist() for length in _PREFIXES], expected.shape[-1])
        found = torch.tensor(answer["probabilities"], dtype=torch.float64)
        wanted = torch.stack([expected[0, length - 1] for length in _PREFIXES]).double().log_softmax(-1)
        for text, tokens in zip(_TEXTS, answer["tokens"], strict=True):
            own = self.tokenizer(text).input_ids
            if tokens != own:
                raise CheckpointError(
                    f"llama.cpp reads {text!r} as the tokens {tokens}, and the model's tokenizer as {own}.",
                    "Export to 'dense', and convert that with llama.cpp's convert_hf_to_gguf.py.",
                )
        centred, reference = found - found.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True)
        return float((centred - reference).norm() / reference.norm())

    @property
    def allowed(self) -> float:
        """The largest difference of a right export; llama.cpp rounds activations to 8 bits where weights are codes."""
        return max(self.tolerance[self.dtype], 0.05 if self.coded else 0.0)

    def _asked(self, folder: Path, prompts: list[list[int]], vocabulary: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            answer = Path(scratch) / "answer.json"
            lora = folder / self.lora_file
            request = {
                "model": str(folder / self.file), "lora": str(lora) if lora.exists() else None, "vocabulary": vocabulary,
                "prompts": prompts, "texts": _TEXTS, "answer": str(answer),
            }  # fmt: skip
            script = Path(__file__).with_name("llama_cpp.py")
            done = subprocess.run(
                [sys.executable, str(script)], input=json.dumps(request), capture_output=True, text=True, cwd=scratch
            )
            if done.returncode or not answer.exists():
                lines = [line for line in done.stderr.splitlines() if " E " in line or "rror" in line] or [
                    f"exit {done.returncode}"
                ]
                raise CheckpointError(
                    f"llama.cpp does not open the export: {' | '.join(lines[-3:])}",
                    "Export to 'dense', and convert that with llama.cpp's convert_hf_to_gguf.py.",
                )
            found: dict[str, Any] = json.loads(answer.read_text())
        return found
