"""Looking at a model before it is compressed: spectrum and outliers of every target, one layer in memory at a time.

With calibration tokens each target is also looked at in the metric of its inputs' gram, and the channels of its inputs, too. A
pass over these tokens then takes as long as the statistics of `svd-llm`; without them only weights are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.collect import targets_by_layer
from ..calibrate.data import Calibration
from ..calibrate.layerwise import TOKENS_PER_BATCH, run_in_chunks, through_layers
from ..calibrate.stats import chunks_of, wanted
from ..compress.base import GroupStats, TargetStats
from ..compress.linalg import root
from ..compress.options import Shape
from ..model.events import Event, Notify, silent
from ..model.layer_forms import target_weight
from ..model.layerwise import in_memory
from ..model.lockstep import Call
from ..model.machine.host_memory import steady_memory
from ..model.machine.precision import full_precision
from ..model.machine.workers import on_devices
from ..model.targets import Target
from ..model.view import ModelView
from .spectrum import RATIOS, Spectrum, energies, outliers, rank_at, spectrum

SCHEMA = 1
_NEEDS = frozenset({"output_gram", "mean_square"})


@dataclass(frozen=True)
class Matrix:
    """What is found about one target.

    Args:
        name: its path in the model.
        layer: number of its layer.
        role: its path in the layer, without an expert's number.
        expert: the expert's number, else None.
        shape: (out, in).
        bytes: of the weight, in the model's dtype.
        ranks: that `RATIOS` allow, for two factors in that dtype.
        largest, kurtosis: outliers of the weight (evaluation/spectrum.py).
        plain: the weight's own spectrum.
        tokens: calibration tokens that reached it; 0 without calibration.
        weighted: the spectrum of its outputs on them; None where no token reached it.
        input_largest: rms of its largest input channel over the rms of all; None as above.
    """

    name: str
    layer: int
    role: str
    expert: int | None
    shape: tuple[int, int]
    bytes: int
    ranks: tuple[int, ...]
    largest: float
    kurtosis: float
    plain: Spectrum
    tokens: int = 0
    weighted: Spectrum | None = None
    input_largest: float | None = None


@dataclass(frozen=True)
class Summary:
    """One number over the targets of a role: the mean, the worst, and the layer of the worst."""

    mean: float
    worst: float
    layer: int


def measure_of(what: str, weighted: bool) -> Callable[[Matrix], float | None]:
    """A number of a matrix by its name: 'rank' (effective, as a fraction of the smaller side), 'energy-0.4' and the like,
    'largest', 'kurtosis', 'input'.

    Args:
        weighted: take the spectrum of the outputs.
    """

    def measure(matrix: Matrix) -> float | None:
        if what in ("largest", "kurtosis"):
            return float(getattr(matrix, what))
        if what == "input":
            return matrix.input_largest
        found = matrix.weighted if weighted else matrix.plain
        if found is None:
            return None
        if what == "rank":
            return found.effective_rank / min(matrix.shape)
        return found.energy[[f"energy-{ratio:g}" for ratio in RATIOS].index(what)]

    return measure


def summary(matrices: Sequence[Matrix], what: str, weighted: bool) -> Summary | None:
    """A number over matrices of one role, None where no matrix has it.

    The worst is the one that is hardest to compress: the highest effective rank, the least energy kept, the largest outlier.
    """
    measure = measure_of(what, weighted)
    found = [(value, matrix.layer) for matrix in matrices if (value := measure(matrix)) is not None]
    if not found:
        return None
    worst, layer = (min if what.startswith("energy") else max)(found, key=lambda pair: pair[0])
    return Summary(fmean(value for value, _ in found), worst, layer)


def by_role(matrices: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """Role -> its matrices, in the order of a forward."""
    found: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        found.setdefault(matrix.role, []).append(matrix)
    return found


def map_of(matrices: Sequence[Matrix], what: str, weighted: bool, layers: int) -> dict[str, list[float | None]]:
    """Role -> the number of each layer, the mean over experts; None where a layer has no such matrix or number."""
    measure = measure_of(what, weighted)
    rows: dict[str, list[float | None]] = {}
    for role, members in by_role(matrices).items():
        cells: list[list[float]] = [[] for _ in range(layers)]
        for matrix in members:
            if (value := measure(matrix)) is not None:
                cells[matrix.layer].append(value)
        rows[role] = [fmean(cell) if cell else None for cell in cells]
    return rows


@dataclass(frozen=True)
class Inspection:
    """Everything that was found about a model.

    Args:
        model: its name.
        architecture: type in config.json.
        dtype: in which the weights are read.
        layers: how many.
        bytes, file_bytes, numel: of all tensors in that dtype; of the files as they are; numbers.
        target_bytes: of the targets, which a ratio counts from.
        matrices: the targets.
        calibration: where the tokens are from (calibrate/data.py); empty without calibration.
        samples: (samples, length) of the tokens.
    """

    model: str
    architecture: str
    dtype: str
    layers: int
    bytes: int
    file_bytes: int
    numel: int
    target_bytes: int
    matrices: tuple[Matrix, ...]
    calibration: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[int, int] = (0, 0)

    @property
    def weighted(self) -> bool:
        """Whether calibration tokens were seen."""
        return bool(self.calibration)

    def as_json(self) -> dict[str, Any]:
        """What `lrc inspect --json` writes: everything, with the schema's number and the ratios."""
        found = {name: getattr(self, name) for name in ("model", "architecture", "dtype", "layers", "bytes", "file_bytes",
                                                        "numel", "target_bytes", "calibration", "samples")}  # fmt: skip
        matrices = [
            {name: value for name, value in vars(matrix).items() if name not in ("plain", "weighted")}
            | {"plain": vars(matrix.plain), "weighted": vars(matrix.weighted) if matrix.weighted else None}
            for matrix in self.matrices
        ]
        return {"schema": SCHEMA, **found, "ratios": RATIOS, "matrices": matrices}


@full_precision
def inspected(
    view: ModelView, calibration: Calibration | None, devices: Sequence[torch.device], notify: Notify = silent
) -> Inspection:
    """Look at every target of a model.

    Args:
        calibration: tokens for the spectra of outputs; None reads weights only.
        devices: layers run on all of them, and spectra are computed on all of them.
        notify: is told of each finished layer.

    Raises:
        LrcError: the checkpoint is damaged, or activations are not finite.
    """
    steady_memory()
    work = _Inspecting(view, devices, notify)
    if calibration is None:
        work.weights()
    else:
        work.outputs(calibration.tokens)
    return Inspection(
        model=view.location.name,
        architecture=view.config.model_type,
        dtype=str(view.dtype).removeprefix("torch."),
        layers=len(view.layers),
        bytes=view.nbytes,
        file_bytes=view.file_bytes,
        numel=view.numel,
        target_bytes=sum(matrix.bytes for matrix in work.found),
        matrices=tuple(work.found),
        calibration=() if calibration is None else calibration.provenance,
        samples=(0, 0) if calibration is None else (calibration.tokens.shape[0], calibration.tokens.shape[1]),
    )


class _Inspecting:
    """One look at a model; `found` grows layer by layer."""

    def __init__(self, view: ModelView, devices: Sequence[torch.device], notify: Notify) -> None:
        self._view, self._devices, self._notify = view, devices, notify
        self._layers = targets_by_layer(view)
        self.found: list[Matrix] = []

    @torch.no_grad()
    def weights(self) -> None:
        """Read one layer after the other, without running any."""
        for index, name in enumerate(self._view.layer_names):
            started = time.perf_counter()
            with in_memory(self._view, name) as layer:
                found = self._matrices(layer, name, self._layers[index], {})
            self.found += [found[target.name] for target in self._layers[index]]
            self._tell(index, started)

    @torch.no_grad()
    def outputs(self, tokens: Tensor) -> None:
        """Run calibration tokens (samples, length) through the layers, and look at each layer while it is in memory."""
        batch = max(1, TOKENS_PER_BATCH // tokens.shape[1])
        through_layers(self._view, tokens.split(batch), self._visit)

    def _visit(self, index: int, name: str, layer: nn.Module, calls: Sequence[Call]) -> list[Any]:
        started, targets = time.perf_counter(), self._layers[index]
        what = wanted(targets, dict.fromkeys((target.name for target in targets), _NEEDS))
        found: dict[str, Matrix] = {}

        def look(statistics: dict[str, TargetStats]) -> None:
            found.update(self._matrices(layer, name, [each for each in targets if each.name in statistics], statistics))

        outputs = run_in_chunks(layer, name, calls, self._devices, chunks_of(targets, what.nbytes), what, look)
        self.found += [found[target.name] for target in targets]
        self._tell(index, started)
        return outputs

    def _matrices(
        self, layer: nn.Module, name: str, targets: Sequence[Target], statistics: Mapping[str, TargetStats]
    ) -> dict[str, Matrix]:
        """Look at these targets of a layer on all devices, at those that read one input on one device."""
        groups: dict[str, list[Target]] = {}
        for target in targets:
            groups.setdefault(target.group, []).append(target)
        found: dict[str, Matrix] = {}

        def look(group: Sequence[Target], device: torch.device) -> None:
            roots: dict[GroupStats, Tensor] = {}
            for target in group:
                stats = statistics.get(target.name)
                weight = target_weight(layer, name, target)[0].to(device)
                found[target.name] = self._matrix(target, weight, None if stats is None else stats.to(device), roots)

        on_devices(list(groups.values()), self._devices, look)
        return found

    def _matrix(self, target: Target, weight: Tensor, stats: TargetStats | None, roots: dict[GroupStats, Tensor]) -> Matrix:
        shape = Shape(target.out_features, target.in_features, self._view.dtype.itemsize)
        ranks = tuple(rank_at(shape, ratio) for ratio in RATIOS)
        weighted, input_largest = None, None
        if stats is not None and stats.group.tokens:
            weighted = spectrum(_weighted(weight, stats, roots), ranks)
            channels = stats.group.mean_square
            assert channels is not None, "it was asked for"
            input_largest = float((channels.max() / channels.mean()).sqrt()) if float(channels.max()) > 0 else 0.0
        own = outliers(weight)
        return Matrix(
            target.name, target.layer, target.role, target.expert, (shape.out_features, shape.in_features), shape.nbytes,
            ranks, own.largest, own.kurtosis, spectrum(energies(weight), ranks),
            0 if stats is None else stats.group.tokens, weighted, input_largest,
        )  # fmt: skip

    def _tell(self, index: int, started: float) -> None:
        self._notify(Event("layer", index + 1, len(self._layers), time.perf_counter() - started))


def _weighted(weight: Tensor, stats: TargetStats, roots: dict[GroupStats, Tensor]) -> Tensor:
    """Energies of the outputs; the root of a group's gram is computed once, where a weight has more outputs than inputs."""
    gram = stats.group.gram
    if stats.output_gram is not None or gram is None or weight.shape[0] <= weight.shape[1]:
        return energies(weight, gram, stats.output_gram)
    if stats.group not in roots:
        roots[stats.group] = root(gram)
    return energies(weight, gram, gram_root=roots[stats.group])
