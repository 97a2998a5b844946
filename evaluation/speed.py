"""How fast a model answers: time to load, memory after loading, prefill and decoding with a cache, beside a baseline.

All models are in memory at once and take turns in every round, so that whatever else the machine does meets each of them alike.
A figure is the median of the rounds; a ratio is the median of each round's ratio.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from ..checkpoint.hf_quantizer import open_model
from ..checkpoint.location import locate
from ..compress.forms.base import is_form_module
from ..compress.forms.codes.encoded import EncodedLinear
from ..compress.forms.cpu.int4 import DENSE_FROM
from ..compress.forms.quantized import QuantizedLinear
from ..model.events import Event, Notify, silent

PREFILL = (512, 2048)  # tokens in a prompt
DECODE = (1, 8, 32)  # sequences in a batch
_PROMPT = 32  # tokens before the first decoded one
_STEPS = 8  # decoded tokens of one round
_COPIED = 1 << 28  # bytes that the bandwidth is measured with


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured.

    Args:
        prefill: lengths of prompts, in tokens.
        decode: batch sizes.
        rounds: how often each workload is repeated.
        clock: in seconds. `time.thread_time`, with one thread on a CPU, leaves out what other programs take.
    """

    prefill: Sequence[int] = PREFILL
    decode: Sequence[int] = DECODE
    rounds: int = 5
    clock: Callable[[], float] = time.perf_counter


@dataclass
class Speed:
    """The figures of one model.

    Args:
        model: its name.
        load_seconds: from the call to a model in memory.
        resident_bytes: growth of the process's resident memory while it was loaded.
        tensor_bytes: bytes of its parameters and buffers.
        file_bytes: of the files of its weights; 0 where that is not known.
        read_bytes: of the tensors that a decoded token reads: all but an input embedding that is not the output head too.
        seconds: workload -> seconds of each round. Workloads are `prefill N` (one prompt of N tokens), `first token` (a prompt
            of 32 tokens) and `decode B` (one token for each of B sequences).
        notes: what makes it slower than it could be.
        forms: how its matrices are multiplied, for `SpeedReport.why_slower`.
    """

    model: str
    load_seconds: float = 0.0
    resident_bytes: int = 0
    tensor_bytes: int = 0
    file_bytes: int = 0
    read_bytes: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    forms: dict[str, int] = field(default_factory=dict)

    def median(self, workload: str) -> float:
        """Seconds of a workload, the median of the rounds."""
        return statistics.median(self.seconds[workload])

    def rate(self, workload: str) -> float:
        """Tokens per second of a workload."""
        kind, _, number = workload.partition(" ")
        return (int(number) if kind in ("prefill", "decode") else 1) / self.median(workload)

    def times_as_fast_as(self, other: Speed, workload: str) -> float:
        """How many times as fast as another model: the median over the rounds of the ratio within a round."""
        pairs = zip(other.seconds[workload], self.seconds[workload], strict=True)
        return statistics.median(theirs / own for theirs, own in pairs)


@dataclass(frozen=True)
class SpeedReport:
    """The figures of all models, and the machine's.

    Args:
        speeds: the model, and the baseline behind it where there is one.
        bandwidth: bytes per second that this machine reads from memory, measured with a large sum.
        threads: of torch.
        dtype: of the weights.
    """

    speeds: tuple[Speed, ...]
    bandwidth: float
    threads: int
    dtype: str

    def as_json(self) -> dict[str, Any]:
        """All figures, as JSON."""
        models = []
        for speed in self.speeds:
            rates = {workload: speed.rate(workload) for workload in speed.seconds}
            models.append(asdict(speed) | {"tokens_per_second": rates, "bytes_per_token_share": self.share(speed)})
        found: dict[str, Any] = {"models": models, "bandwidth": self.bandwidth, "threads": self.threads, "dtype": self.dtype}
        if len(self.speeds) == 2:
            own, base = self.speeds
            found["times_as_fast"] = {workload: own.times_as_fast_as(base, workload) for workload in own.seconds}
            found["why_slower"] = self.why_slower()
        return found

    def share(self, speed: Speed) -> float | None:
        """Which fraction of the time of a decoded token is needed to read its tensors once; None where none was decoded."""
        if "decode 1" not in speed.seconds:
            return None
        return speed.read_bytes / self.bandwidth / speed.median("decode 1")

    def why_slower(self) -> dict[str, str]:
        """Workload -> the reason, for those in which the first model is slower than its baseline."""
        if len(self.speeds) != 2:
            return {}
        own, base = self.speeds
        slower = [workload for workload in own.seconds if own.times_as_fast_as(base, workload) < 1]
        return {workload: "; ".join(_reasons(own.forms, _rows(workload))) for workload in slower}


@torch.no_grad()
def measure_speed(
    names: Sequence[str],
    settings: SpeedSettings,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    notify: Notify = silent,
) -> SpeedReport:
    """Load the models and measure them in turns.

    Args:
        names: of the models: one, or one and its baseline.
        settings: what is measured.
        dtype: of all models; None: that of the first one's checkpoint.
        device: where they run.
        trust_remote_code: whether code in a checkpoint may run.
        notify: receives an `Event` after each round.

    Raises:
        ModelError, CheckpointError: a model cannot be loaded.
    """
    speeds, models = [], []
    for name in names:
        speed, model = _loaded(name, dtype, device, trust_remote_code)
        dtype = dtype or model.dtype
        speeds.append(speed)
        models.append(model)
    return in_turns(speeds, models, settings, notify)


@torch.no_grad()
def in_turns(speeds: Sequence[Speed], models: Sequence[Any], settings: SpeedSettings, notify: Notify = silent) -> SpeedReport:
    """Measure models that are in memory, one after the other in every round.

    Args:
        speeds: what is known of each model; the seconds are added.
        models: of transformers, on one device and in one dtype.
        settings: what is measured.
        notify: receives an `Event` after each workload.
    """
    longest = min(getattr(m.config.get_text_config(), "max_position_embeddings", None) or 1 << 30 for m in models)
    lengths, clock = [n for n in settings.prefill if n <= longest], settings.clock
    work: dict[str, Callable[[Any], float]] = {"first token": lambda model: _prefill(model, _PROMPT, clock)}
    work |= {f"prefill {n}": lambda model, n=n: _prefill(model, n, clock) for n in lengths}  # type: ignore[misc]
    work |= {f"decode {n}": lambda model, n=n: _decode(model, n, clock) for n in settings.decode}  # type: ignore[misc]
    for number, (workload, run) in enumerate(work.items(), 1):
        for model in models:
            run(model)  # the first time allocates
        for turn in range(settings.rounds):
            order = list(zip(speeds, models, strict=True))
            for speed, model in order if turn % 2 == 0 else reversed(order):
                speed.seconds.setdefault(workload, []).append(run(model))
        notify(Event(workload, done=number, total=len(work)))
    held = models[0].dtype
    return SpeedReport(tuple(speeds), _bandwidth(models[0].device), torch.get_num_threads(), str(held).removeprefix("torch."))


def _loaded(name: str, dtype: torch.dtype | None, device: str, trust_remote_code: bool) -> tuple[Speed, Any]:
    process = psutil.Process()
    before, begun = process.memory_info().rss, time.perf_counter()
    model, _ = open_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    seconds = time.perf_counter() - begun
    location = locate(name)
    files = [location.path / location.gguf] if location.gguf else list(location.path.glob("*.safetensors"))
    speed = described(name, model)
    speed.load_seconds, speed.resident_bytes = seconds, process.memory_info().rss - before
    speed.file_bytes = sum(file.stat().st_size for file in files)
    return speed, model


def described(name: str, model: Any) -> Speed:
    """What is known of a model in memory before it is timed."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    held = sum(tensors.values())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight.data_ptr() == table.weight.data_ptr()
    return Speed(
        name,
        tensor_bytes=held,
        read_bytes=held if tied else held - table.weight.nbytes,
        notes=_notes(model),
        forms=_forms(model),
    )


_TWO_PRODUCTS = {"LowRankLinear", "SharedLowRankLinear", "ProductLinear", "DictionaryLinear", "SharedDictionaryLinear"}


def _forms(model: Any) -> dict[str, int]:
    """How many matrices are multiplied in which way."""
    found = {"packed": 0, "unpacked": 0, "rotated": 0, "two products": 0}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            found["unpacked" if module.why_unpacked() else "packed"] += 1
        found["rotated"] += isinstance(module, EncodedLinear)
        found["two products"] += is_form_module(module) and type(module).__name__ in _TWO_PRODUCTS
    return found


def _notes(model: Any) -> list[str]:
    """What makes a compressed model slower than its bytes allow."""
    notes = []
    coded = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    unpacked = Counter(reason for module in coded if (reason := module.why_unpacked()))
    for reason, count in unpacked.items():
        notes.append(f"{count} of {len(coded)} matrices in codes are decoded at every call: {reason}")
    wider = Counter(module.grid.bits for module in coded if not module.why_unpacked() and module.grid.bits not in (4, 8))
    for bits, count in sorted(wider.items()):
        notes.append(
            f"{count} matrices of {bits} bits take {4 if bits < 4 else 8} in memory, because the kernel knows 4-bit codes"
        )
    rotated = [module for module in model.modules() if isinstance(module, EncodedLinear)]
    for reason, count in Counter(reason for module in rotated if (reason := module.why_slow())).items():
        notes.append(f"{count} of {len(rotated)} matrices in a trellis or lattice are decoded by torch's operations: {reason}")
    if two := _forms(model)["two products"]:
        notes.append(f"{two} matrices are two products each, which costs more than it saves where matrices are small")
    return notes


def _rows(workload: str) -> int:
    """Rows of input that a matrix is multiplied with."""
    kind, _, number = workload.partition(" ")
    return int(number) if kind in ("prefill", "decode") else _PROMPT


def _reasons(forms: dict[str, int], rows: int) -> list[str]:
    """Why products of so many rows are slower than dense ones."""
    found = []
    unpacked, packed, rotated, two = (forms.get(kind, 0) for kind in ("unpacked", "packed", "rotated", "two products"))
    if rotated:
        found.append(f"{rotated} matrices in a trellis or lattice are decoded, and inputs and outputs rotated, at every call")
    if unpacked:
        found.append(f"{unpacked} matrices are decoded at every call")
    if packed:
        found.append(
            f"{packed} matrices are decoded for one dense product of all rows"
            if rows >= min(DENSE_FROM.values())
            else f"the kernel for the codes of {packed} matrices computes each row by itself"
        )
    if two:
        found.append(f"{two} matrices are two products each, and small ones take longer to start than to compute")
    return found or ["its matrices are multiplied as the baseline's are; the difference is noise, or in the architecture"]


def _prefill(model: Any, length: int, clock: Callable[[], float]) -> float:
    ids = _tokens(model, 1, length)
    begun = clock()
    model(ids, use_cache=True, logits_to_keep=1)
    _wait(model)
    return clock() - begun


def _decode(model: Any, batch: int, clock: Callable[[], float]) -> float:
    """Seconds for one token of each sequence, the mean of some steps with the model's own cache."""
    out = model(_tokens(model, batch, _PROMPT), use_cache=True, logits_to_keep=1)
    last = _tokens(model, batch, 1)
    _wait(model)
    begun = clock()
    for _ in range(_STEPS):
        out = model(last, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    _wait(model)
    return (clock() - begun) / _STEPS


def _tokens(model: Any, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory: the best of five sums of 256 MiB."""
    held = torch.ones(_COPIED // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        float(held.sum())
        best = min(best, time.perf_counter() - begun)
    return _COPIED / best
