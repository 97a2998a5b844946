"""What quantized exports share: which modules they can hold in codes, and which they must multiply out."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.forms.base import Spec
from ..compress.forms.grids import Grid, Scales
from ..compress.forms.pruned import Pruned
from ..compress.forms.quantized import Quantized, QuantizedLinear, QuantizedLowRank
from ..errors import CheckpointError
from .adapter import CONFIG, adapter_config, adapter_nbytes, adapter_tensors
from .base import Carried, Format, Tensors
from .multiplied import Multiplied
from .source import Source

KINDS = (Quantized.kind, QuantizedLowRank.kind)


@dataclass(frozen=True)
class Coded:
    """A module whose codes an export carries.

    Args:
        grid: of its codes.
        rows, columns: of its matrix.
        rank: of the low-rank correction beside it; 0 where it has none.
    """

    grid: Grid
    rows: int
    columns: int
    rank: int

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return self.rows * self.columns


class QuantizedResult:
    """A result of which some modules stay in codes, and all others are multiplied out.

    Args:
        source: the result.
        name: of the export format, for messages.
        why_not: grid, rows, columns -> why the format cannot hold such codes; empty where it can.

    Attributes:
        coded: module path -> what stays in codes.
        multiplied: the plain model, for everything else.

    Raises:
        RequestError: nothing could stay in codes, or the plain architecture has no place for a module.
    """

    def __init__(self, source: Source, name: str, why_not: Callable[[Grid, int, int], str]) -> None:
        self.source, self.multiplied = source, Multiplied(source, name)
        self.coded: dict[str, Coded] = {}
        self.reasons = Counter[str]()
        carried = Carried()
        for path, spec in source.specs.items():
            reason = self._add(path, spec, why_not)
            if reason:
                carried.refused[path] = reason
        self.reasons.update(carried.refused.values())
        if not self.coded:
            carried.refused = carried.refused or {"": "no module of this result has codes"}
            carried.require(name, "The formats 'dense' and 'self-contained' carry every result of this kind.")

    def _add(self, path: str, spec: Spec, why_not: Callable[[Grid, int, int], str]) -> str:
        """Keep this module in codes, or say why not."""
        if spec["kind"] == "experts":
            return "experts of a mixture"
        inner = spec["form"] if spec["kind"] == Pruned.kind else spec
        if inner["kind"] not in KINDS:
            return f"form '{inner['kind']}'"
        plain = self.multiplied.model.get_submodule(path)
        if type(plain) is not nn.Linear:
            return f"a {type(plain).__name__}, which stores its weight transposed"
        rows, columns = plain.weight.shape
        if spec["kind"] == Pruned.kind and (spec["rows"], spec["columns"]) != (rows, columns):
            return "layers keep different numbers of channels"
        grid = Grid(**inner["grid"])
        if reason := why_not(grid, rows, columns):
            return reason
        self.coded[path] = Coded(grid, rows, columns, _rank(inner))
        return ""

    @property
    def lost(self) -> tuple[str, ...]:
        """One sentence for each reason why modules are multiplied out."""
        return tuple(
            f"{count} modules are stored as dense matrices: {reason}." for reason, count in sorted(self.reasons.items())
        )

    def dense_nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of everything that is not in codes; biases of coded modules are among it."""
        coded = sum(each.numel for each in self.coded.values()) * dtype.itemsize
        return self.multiplied.nbytes(dtype) - coded

    def ranks(self) -> dict[str, int]:
        """Module path -> rank of its correction, where it has one."""
        return {path: each.rank for path, each in self.coded.items() if each.rank}

    def parts(
        self, dtype: torch.dtype, encode: Callable[[str, QuantizedLinear], dict[str, Tensor]], factors: dict[str, Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        """The tensors of the export, a layer at a time.

        Args:
            dtype: of floating-point tensors.
            encode: path and module of a matrix in codes -> its tensors, by the last part of their names.
            factors: receives the factors of corrections: path.left (out, rank) and path.right (rank, in).
        """

        def coded(path: str) -> dict[str, Tensor]:
            module: Any = self.source.view.model.get_submodule(path)
            part = {f"{path}.{last}": tensor for last, tensor in encode(path, module).items()}
            if module.bias is not None:
                part[f"{path}.bias"] = module.bias.detach().to(dtype)
            if self.coded[path].rank:
                left, right = factors_of(module.correction)
                factors[f"{path}.left"], factors[f"{path}.right"] = left.to(dtype), right.to(dtype)
            return part

        return self.multiplied.parts(dtype, self.coded, coded)


def factors_of(correction: Any) -> tuple[Tensor, Tensor]:
    """The factors (out, rank) and (rank, in) of a correction in float32; they may be in codes themselves."""
    if hasattr(correction.left, "matrix"):  # a module of its own
        return correction.left.matrix(torch.float32), correction.right.matrix(torch.float32)
    return correction.left.detach().float(), correction.weight.detach().float()


def codes_of(module: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (out, in) uint8, steps (out, groups) float32, and zeros (out, groups) uint8 or None for the middle code."""
    unpacked: tuple[Tensor, Scales] = module.unpacked()
    codes, scales = unpacked
    return codes, scales.steps.detach().float(), scales.zeros


def exact(path: str, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Steps in the dtype of the export.

    Raises:
        CheckpointError: the dtype does not represent them exactly.
    """
    scale = steps.to(dtype)
    if not torch.equal(scale.float(), steps):
        raise CheckpointError(
            f"'{path}': steps of {float(steps.min()):.3g} to {float(steps.max()):.3g} have no exact value in "
            f"{str(dtype).removeprefix('torch.')}.",
            "Export with --dtype bfloat16 or float32.",
        )
    return scale


def _rank(spec: Spec) -> int:
    return int(spec["correction"]["rank"]) if spec["kind"] == QuantizedLowRank.kind else 0


class CodedFormat(Format):
    """A format of codes with corrections as an adapter beside them."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.result = QuantizedResult(source, self.name, self.why_not)
        self._factors: Tensors = {}
        super().__init__(source, dtype)

    @staticmethod
    @abstractmethod
    def why_not(grid: Grid, rows: int, columns: int) -> str:
        """Why the format cannot hold the codes of such a matrix; empty where it can."""

    @abstractmethod
    def encoded(self, path: str, module: QuantizedLinear) -> Tensors:
        """The tensors of a matrix in codes, by the last part of their names."""

    def adapter_nbytes(self) -> int:
        """Bytes of the corrections."""
        coded, ranks = self.result.coded, self.result.ranks()
        return adapter_nbytes(ranks, {path: (coded[path].rows, coded[path].columns) for path in ranks}, self.dtype.itemsize)

    @property
    def replaced(self) -> tuple[str, ...]:
        """What a person must know of corrections beside codes; empty where there are none."""
        said = "A further adapter of PEFT takes the place of the corrections, without a word; train on the result itself."
        return (said,) if self.result.ranks() else ()

    def parts(self) -> Iterator[Tensors]:
        return self.result.parts(self.dtype, self.encoded, self._factors)

    def beside(self) -> Tensors:
        return adapter_tensors(self._factors)

    def files(self) -> dict[str, bytes]:
        ranks = self.result.ranks()
        return {CONFIG: adapter_config(ranks)} if ranks else {}
